"""The command line of every script: ``--config NAME_OR_FILE`` merged left to right, then ``key=value``.

YAML is read as text, not as Python values, so that a value means the same in a file and on the command line and
depends on its key alone: ``run.name: yes`` stays a text, ``cae.layers: 010`` is ten, ``trainer.max_epochs: 1e3`` is
whole. Every mistake is a ``UserError`` that says where it is and how to mend it.
"""

import difflib
import os
import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rsdyn.config.schema import (
    Config,
    check,
    idle,
    idle_in_analysis,
    options,
    sections,
    to_yaml,
    unused_by,
    unveiled,
    veiled,
)
from rsdyn.config.trainer_options import check_trainer_options
from rsdyn.errors import UserError
from rsdyn.options import Option, show

_CHECKOUT = Path(__file__).parents[2]
# of a checkout; an installed package has its own copy of the presets
CONFIGS = _CHECKOUT / "configs" if (_CHECKOUT / "pyproject.toml").is_file() else _CHECKOUT / "rsdyn" / "presets"
COMMAND_LINE = "command line"
PROSE = ("run.name", "data.text_column", "tracking.project")  # where ${HOME} is what somebody calls a thing
PLAN = "--plan"
FLAGS = ("--config", "--print-config", PLAN, "--help")
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def load_config(argv: Sequence[str], script: str) -> Config:
    """Read the settings of ``script`` from its arguments (without the program's name) and check them.

    ``--help`` and ``--print-config`` print to stdout and raise ``SystemExit(0)``; ``--plan`` is for the caller, who
    looks for it (:data:`PLAN`). Raises ``UserError`` on any mistake.
    """
    for flag in ("--help", "-h"):
        if flag in argv:
            topic = next(iter(argv[argv.index(flag) + 1 :]), None)
            print(help_text(script, None if topic is None or topic.startswith("-") or "=" in topic else topic))
            raise SystemExit(0)
    files, words, print_config = _split(argv)
    layers = [layer for name in files for layer in _file_layers(name)]
    layers += [_layer(key, _word_node(key, text), COMMAND_LINE) for key, text in words]
    _check_used(words, script)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *veiled(layers))
        config: Config = unveiled(OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:  # the layers are checked already: this is what OmegaConf alone refuses
        raise UserError(f"The settings do not fit together: {str(error).splitlines()[0]}") from None
    check(config)
    check_trainer_options(config.trainer.options, script=script, max_epochs=config.trainer.max_epochs)
    if script == "train" and not config.analysis.on_train:
        for key, text in words:
            if key.startswith("analysis.") and key != "analysis.on_train":
                raise UserError(
                    f"{key}={show(text)} ({COMMAND_LINE}) would change nothing, since train.py does not measure unless "
                    "asked. Add analysis.on_train=true, or leave it out."
                )
    reasons = {"perturb": idle, "analyze": idle_in_analysis}
    for key, text in words if script in reasons else []:
        if (why := reasons[script](key, config)) is not None:
            raise UserError(f"{key}={show(text)} ({COMMAND_LINE}) would change nothing {why}. Leave it out.")
    if print_config:
        print(to_yaml(config), end="")
        raise SystemExit(0)
    return config


def _check_used(words: list[tuple[str, str]], script: str) -> None:
    """Refuse a setting that the script would not look at."""
    for key, text in words:
        if (by := unused_by(key, script)) is not None:
            raise UserError(
                f"{key}={show(text)} ({COMMAND_LINE}) would change nothing: {key} is used {by}. Leave it out."
            )


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], bool]:
    """Sort the arguments into config files, ``(key, text)`` pairs, and whether to print the result."""
    files, words, print_config = [], [], False
    rest = iter(argv)
    for word in rest:  # a word that ends in an error takes the next one as the value that was meant
        flag, equals, value = word.partition("=")
        if word == "--print-config":
            print_config = True
        elif word == PLAN:
            continue
        elif flag == "--config":
            value = value if equals else next(rest, "")
            if not value or value.startswith("-"):
                raise UserError(f"--config needs a name or a file after it. {_presets()}")
            files.append(value)
        elif word.startswith("-"):
            raise _unknown_flag(flag, value if equals else _value_meant(rest))
        elif not equals:
            raise _no_equals(word, _value_meant(rest))
        else:
            words.append((flag.strip(), value))
    return files, words, print_config


def _value_meant(rest: Iterator[str]) -> str:
    word = next(rest, "")
    word = next(rest, "") if word == "=" else word
    return "VALUE" if not word or "=" in word or word.startswith("--") else word


def _unknown_flag(flag: str, value: str) -> UserError:
    keys = nearest_keys(flag.lstrip("-").replace("-", "_"))
    flags = difflib.get_close_matches(flag, FLAGS, n=1, cutoff=0.75)
    if flags:
        cure = f"Did you mean {flags[0]}?"
    elif keys:
        cure = f"Settings have no dashes: write {keys[0]}={value or 'VALUE'}."
    else:
        cure = "Run with --help to see every key."
    return UserError(f"{flag} is not an option; there are {', '.join(FLAGS[:-1])} and {FLAGS[-1]}. {cure}")


def _no_equals(word: str, value: str) -> UserError:
    if word in sections():
        return _section_error(word, COMMAND_LINE)
    keys = nearest_keys(word)
    if word in preset_names() or Path(word).suffix in (".yaml", ".yml"):
        cure = f"Did you mean --config {word}?"
    elif keys:
        cure = f"Write {keys[0]}={value}, without spaces around the '='."
    else:
        cure = "Run with --help to see every key."
    return UserError(f"{show(word)} ({COMMAND_LINE}) has no value: a setting is written key=value. {cure}")


# --- files ---------------------------------------------------------------------------------------------------------


def preset_names() -> list[str]:
    """The presets in ``configs/``; what is named sweep-* there is for ``wandb sweep``."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("sweep-"))


def _presets() -> str:
    return f"The presets are {', '.join(preset_names()) or 'missing (no configs folder beside the package)'}."


def _read(name: str) -> tuple[str, str]:
    """Find a preset or a file; return how to call it in messages, and its text."""
    path, shown = Path(os.path.expanduser(name)), name
    if not (path.suffix in (".yaml", ".yml") or path.name != name or path.is_file()):
        path, shown = CONFIGS / f"{name}.yaml", f"configs/{name}.yaml"
        if name not in preset_names():
            near = difflib.get_close_matches(name, preset_names(), n=1)
            cure = f"Did you mean --config {near[0]}?" if near else "A file of your own needs its path or its .yaml."
            raise UserError(f"--config {name}: no preset has this name. {_presets()} {cure}")
    try:
        return shown, path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"--config {name}: there is no such file. Check the path, or take a preset. {_presets()}"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"--config {name}: this is not a text file in UTF-8. Give a YAML file.") from None
    except OSError as error:
        raise UserError(f"--config {name}: cannot be read ({error.strerror}). Give a YAML file you may read.") from None


def _compose(text: str, where: str, cure: str) -> yaml.Node | None:
    """Parse YAML into nodes, which keep the text of each value and never build a Python object."""
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):  # they can repeat themselves without end
                raise UserError(
                    f"{where}, line {event.start_mark.line + 1}: write the value out instead of *{event.anchor}."
                )
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise UserError(f"{where}{line}: this is not valid YAML ({problem}). {cure}") from None
    except RecursionError:
        raise UserError(f"{where}: this YAML is nested too deeply. Write it flatter.") from None


def _file_layers(name: str) -> list[dict[str, Any]]:
    shown, text = _read(name)
    root = _compose(text, shown, "Write 'key: value' with a space after the colon, and indent with spaces.")
    if root is None or root.tag == _NULL:
        return []
    if not isinstance(root, yaml.MappingNode):
        raise UserError(
            f"{shown}: a config file holds 'key: value' lines or sections of them, such as 'cae: {{lr: 1e-3}}'."
        )
    seen: dict[str, str] = {}
    layers = []
    for key, node, where in _settings(root, "", shown):
        if key in seen:
            raise UserError(f"{key} ({where}) is given twice: it stands in {seen[key]} already. Remove one of them.")
        seen[key] = where
        layers.append(_layer(key, node, where))
    return layers


def _settings(mapping: yaml.MappingNode, prefix: str, shown: str) -> Iterator[tuple[str, yaml.Node, str]]:
    for key_node, node in mapping.value:
        where = f"{shown}, line {key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{where}: a key must be a plain word such as cae.")
        key = prefix + key_node.value
        if key not in sections():
            yield key, node, where
        elif isinstance(node, yaml.MappingNode):
            yield from _settings(node, key + ".", shown)
        elif node.tag != _NULL:  # a section whose lines are all commented out is no mistake
            raise _section_error(key, where, str(node.value) if isinstance(node, yaml.ScalarNode) else "[...]")


# --- one setting ---------------------------------------------------------------------------------------------------


def _mapping_owner(key: str) -> Option | None:
    """Find the key that takes a mapping and that ``key`` lies in: trainer.options for trainer.options.a."""
    return next((o for o in options().values() if o.kind == "dict" and key.startswith(o.key + ".")), None)


def _word_node(key: str, text: str) -> yaml.Node:
    """Turn the text after '=' into a node: YAML where the key takes lists and mappings, else the raw text."""
    option = options().get(key)
    if text.strip() and (
        _mapping_owner(key) or (option is not None and option.kind in ("dict", "list", "str or dict"))
    ):
        node = _compose(
            text, f"{key}={show(text)} ({COMMAND_LINE})", "Write for example 5, text or '{a: 1, b: [2, 3]}'."
        )
        if node is not None:
            return node
    return yaml.ScalarNode(_TEXT, text)


def _layer(key: str, node: yaml.Node, where: str) -> dict[str, Any]:
    """Check one setting and nest its value under the parts of its key, ready to be merged."""
    option, parts = options().get(key), key.split(".")
    given = str(node.value) if isinstance(node, yaml.ScalarNode) else ""
    if key in sections():
        raise _section_error(key, where, given)
    if "" in parts or (option is None and _mapping_owner(key) is None):
        raise _unknown_key(key, where, given)
    untyped = option is None or option.kind in ("dict", "str or dict")
    value = _typed(option, node, where) if option is not None and not untyped else _untyped(key, node, where)
    if option is not None and not option.accepts(value):
        raise option.error(value if option.kind == "list" else given or value, where)
    nested: dict[str, Any] = {parts[-1]: value}
    for part in reversed(parts[:-1]):
        nested = {part: nested}
    return nested


def _text_of(key: str, node: yaml.ScalarNode, where: str) -> str:
    text = str(node.value)
    named = [name for name in re.findall(r"\$\{([^}]*)", text) if name in options() or name.startswith("oc.")]
    if key == "perturb.prompt" or (key in PROSE and not named and text != "???"):
        return text
    if "${" in text or text == "???":
        raise UserError(
            f"{key}={show(text)} ({where}) is not allowed: settings are plain values, and '${{...}}' and '???' "
            "stand for others. Write the value itself; the shell replaces $NAME where it is not in single quotes."
        )
    return text


def _typed(option: Option, node: yaml.Node, where: str) -> Any:
    """Read the text of a node as the type of its key. What does not read is returned or raised as it stands."""
    if option.kind == "list" and isinstance(node, yaml.SequenceNode):
        return [_item(option, item, where) for item in node.value]
    if not isinstance(node, yaml.ScalarNode):
        raise option.error("[...]" if isinstance(node, yaml.SequenceNode) else "{...}", where)
    text = _text_of(option.key, node, where)
    word = text.strip().lower()
    if option.optional and word and (node.tag == _NULL or word in ("null", "none")):
        return None
    if not word:
        cure = "Write null to unset it" if option.optional else "Give one"
        raise UserError(
            f"{option.key}= ({where}) has no value: it must be {option.allowed()}. {cure}, or leave {option.key} "
            f"out for its default, {show(option.default)}."
        )
    if node.tag == _NULL:
        raise option.error(None, where)
    if option.kind == "list":  # one item alone, or a,b without brackets
        return [_item(option, yaml.ScalarNode(_TEXT, part.strip()), where) for part in text.split(",")]
    if option.kind == "str":
        return text
    if option.kind == "bool":
        if word not in _TRUTH:
            raise option.error(text, where)
        return _TRUTH[word]
    number = _number(word)
    if number is None or (option.kind != "float" and number != int(number)):
        if option.kind == "int or str":
            return text
        raise option.error(text, where)
    return float(number) if option.kind == "float" else int(number)


def _item(option: Option, node: yaml.Node, where: str) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise option.error("[[...]]", where)
    text = _text_of(option.key, node, where)
    number = _number(text.strip()) if option.item != "str" else None
    if number is None:
        return text
    return float(number) if option.item == "float" else int(number) if number == int(number) else number


def _number(text: str) -> int | float | None:
    """Read a finite decimal number; 1e3 is a float here. None when the text is something else."""
    if not re.fullmatch(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)(e[-+]?\d+)?", text, re.ASCII | re.IGNORECASE):
        return None
    for kind in (int, float):
        try:
            number = kind(text)
            float(number)  # an int too large for a float is no setting of ours
            return number if abs(number) != float("inf") else None
        except (ValueError, OverflowError):
            continue
    return None


def _untyped(key: str, node: yaml.Node, where: str) -> Any:
    """Read a value whose key says no type: YAML 1.2's words for numbers, booleans and null, else text."""
    if isinstance(node, yaml.MappingNode):
        if any(not isinstance(name, yaml.ScalarNode) for name, _ in node.value):
            raise UserError(f"{key} ({where}): the keys of a mapping must be plain words.")
        return {name.value: _untyped(f"{key}.{name.value}", value, where) for name, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_untyped(key, value, where) for value in node.value]
    assert isinstance(node, yaml.ScalarNode)  # YAML has no fourth kind
    text = _text_of(key, node, where)
    if node.style is not None and node.tag == _TEXT:  # in quotes
        return text
    if text.strip() == "":
        raise UserError(f"{key}= ({where}) has no value. Give one (null is Python's None), or leave {key} out.")
    if text in ("null", "Null", "NULL", "~"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    number = _number(text)
    if number is None and re.fullmatch(r"[-+]?\.?(inf|nan|infinity)", text, re.IGNORECASE):
        raise UserError(f"{key}={text} ({where}) is not allowed: numbers must be finite. Give another value.")
    return text if number is None else number


def _given(key: str, value: str, where: str) -> str:
    return f"{show(key)}={show(value)} ({where})" if value else f"{show(key)} ({where})"


def _section_error(key: str, where: str, value: str = "") -> UserError:
    inside = [option for option in options().values() if option.section == key]
    return UserError(
        f"{_given(key, value, where)}: {key} is a section, which takes no value. Set one of its keys, "
        f"{', '.join(o.key for o in inside)}; for example {inside[0].key}={show(inside[0].default)}."
    )


def _unknown_key(key: str, where: str, value: str) -> UserError:
    flag = f"--{key}".replace("_", "-")
    near = [*([flag] if flag in FLAGS else []), *nearest_keys(key)]
    if not near:  # trainer.gradient_clip_val is one of trainer.options
        section, _, leaf = key.rpartition(".")
        near = [f"{o.key}.{leaf}" for o in options().values() if o.kind == "dict" and o.section == section and leaf]
    cure = f"Did you mean {' or '.join(near)}?" if near else "Run with --help to see every key."
    return UserError(f"{_given(key, value, where)}: there is no key {show(key) or 'without a name'}. {cure}")


def nearest_keys(key: str) -> list[str]:
    """Name the keys that a mistyped one may have meant, best first and at most three.

    The last part counts most (``lr`` and ``trainer.lr`` mean ``cae.lr``); other names for a key count as its own.
    """
    key = key.lower()
    leaf = key.rpartition(".")[2]

    def ratio(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    scores = {}
    for full, option in options().items():
        own_leaf = full.rpartition(".")[2]
        if key == full or leaf in option.rules.also or key in option.rules.also or key.startswith(full + "."):
            scores[full] = 2.0
        else:
            scores[full] = 0.6 * ratio(leaf, own_leaf) + 0.4 * ratio(key, full)
            if option.kind == "dict" and key.count(".") > full.count("."):  # trainer.option.a
                scores[full] = ratio(key.rpartition(".")[0], full)
    best = max(scores.values())
    near = [full for full, score in scores.items() if score >= max(0.6, best - 0.05)]
    return sorted(near, key=lambda full: -scores[full])[:3]


# --- help ----------------------------------------------------------------------------------------------------------


def _default(option: Option) -> str:
    everything = option.kind == "list" and list(option.rules.choices) == option.default
    text = "all" if everything else show(option.default)
    return text if len(text) <= 24 else f"{text[:20]}..."


def help_text(script: str, topic: str | None = None, columns: int | None = None) -> str:
    """The settings that a script looks at, a line or more each: name, type, default, meaning and allowed values.

    Args:
        script: ``train``, ``analyze`` or ``perturb``, or the name of its file.
        topic: a section, or one key; None for all sections of the script.
        columns: how wide it may be; None asks the terminal, or takes 120 where there is none.

    Raises ``UserError`` for a topic that there is not.
    """
    name = Path(script).stem
    width = shutil.get_terminal_size((120, 24)).columns if columns is None else columns
    width = min(max(width, 40), 120) - 2
    used = [option for option in options().values() if unused_by(option.key, name) is None]
    shown = used if topic is None else _about(topic, name)
    lines = _usage(name, width) if topic is None else []
    section = None
    for option in shown:
        if option.section != section:
            section = option.section
            title = f"{section}: {sections()[section]}" if section else "Every script:"
            lines += [""] * bool(lines) + textwrap.wrap(title, width, subsequent_indent="  ")
        lines += _entry(option, shown, width)
    return "\n".join(lines)


def _about(topic: str, script: str) -> list[Option]:
    """The keys of a section and of those in it, or the one of that name."""
    found = [o for o in options().values() if topic in (o.key, o.section) or o.key.startswith(f"{topic}.")]
    if not found:
        near = [*difflib.get_close_matches(topic, sections(), n=1), *nearest_keys(topic)][:1]
        cure = f"Did you mean --help {near[0]}?" if near else ""
        own = [name for name in sections() if any(unused_by(o.key, script) is None for o in _about(name, script))]
        raise UserError(f"--help {topic}: there is no such section or key. {cure} The sections are {', '.join(own)}.")
    return found


def _usage(script: str, width: int) -> list[str]:
    flags = {
        "--config NAME_OR_FILE": f"a preset or YAML file; several merge left to right. Presets: "
        f"{', '.join(preset_names())}",
        "key=value": "overrides them, for example cae.lr=3e-4; null unsets a key that takes null",
        "--print-config": "print the settings that result, as YAML, and exit",
        "--plan": "print what the run will need and what does not fit, and exit: nothing is loaded",
        "--help [SECTION]": "print this, or one section or key, and exit",
    }
    usage = f"usage: python {script}.py [--config NAME_OR_FILE]... [key=value]... [--plan] [--print-config]"
    lines = [*textwrap.wrap(usage, width, subsequent_indent=" " * 7), ""]
    for flag, meaning in flags.items():
        lines += _beside(f"  {flag}".ljust(25), meaning, width)
    return lines


def _entry(option: Option, others: list[Option], width: int) -> list[str]:
    """A setting: its cells beside its meaning, or above it where there is little room."""
    rows = [(o.key, o.kind + (" or null" if o.optional else ""), _default(o)) for o in others]
    cells = rows[others.index(option)]
    widths = [max(len(row[i]) for row in rows) + 2 for i in range(3)]
    allowed = " | ".join(option.rules.choices) or option.rules.allowed or option.bounds()
    meaning = option.rules.help + (f" [{allowed}]" if allowed else "")
    if width - 2 - sum(widths) >= 32:
        head = "  " + "".join(cell.ljust(wide) for cell, wide in zip(cells, widths, strict=True))
        return _beside(head, meaning, width)
    return [f"  {cells[0]}  ({cells[1]}; {cells[2]})", *_beside(" " * 6, meaning, width)]


def _beside(head: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text,
        width,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_on_hyphens=False,
        break_long_words=False,
    )
