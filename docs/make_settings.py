"""Write docs/settings.md, every setting as the schema has it: python docs/make_settings.py."""

from pathlib import Path

from rsdyn.config.schema import options, sections
from rsdyn.options import show

PAGE = Path(__file__).with_name("settings.md")


def page() -> str:
    """The page: a table per section, in the order of the schema."""
    lines = [
        "# Every setting",
        "",
        "Made from the schema by `docs/make_settings.py`. On a command line `key=value`; in a YAML file nested.",
        "",
    ]
    about = {"": "Of every script.", **sections()}
    for name, meaning in about.items():
        keys = {k: o for k, o in options().items() if k.rpartition(".")[0] == name}
        if not keys:
            continue
        lines += [f"## {name or 'Top level'}", "", meaning, "", "| key | default | values | |", "|---|---|---|---|"]
        for key, option in keys.items():
            cells = (f"`{key}`", f"`{show(option.default)}`", option.allowed(), option.rules.help)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
