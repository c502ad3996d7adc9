"""Compare models, revisions or checkpoints: ``rsdyn compare A B C [key=value]``, one page and one table.

Runs ``analyze`` for each model and puts the findings beside each other, a row per finding and a column per model, with
a warning wherever text, N, filter, positions or BOS differ. Checkpoints of one training are drawn against its steps.
It resumes: the same command runs what is not finished, and what failed, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsdyn.analysis.comparison import Comparison, compare
from rsdyn.analysis.comparison_table import answer, as_json, as_markdown, as_text
from rsdyn.analysis.settings import MEASURES
from rsdyn.analysis.shape import check_installed
from rsdyn.config.command_line import PLAN, load_config
from rsdyn.config.naming import in_keys
from rsdyn.errors import UserError
from rsdyn.files import SUMMARY, write_json, write_text
from rsdyn.options import show
from rsdyn.run.comparing import JSON, Job, check_settings, described, open_job, run_all, run_plan
from rsdyn.run.models_to_compare import Entry, default_models, find_models, read_list
from rsdyn.run.output import unbroken_output
from rsdyn.run.signals import Interrupted

USAGE = """usage: rsdyn compare [MODEL ...] [revision=[A,B]] [--config NAME_OR_FILE]... [key=value]... [--plan]

Measure several models alike and compare what is found, on one page.

  MODEL                  a name on the Hub (NAME@REVISION takes one revision), a folder, a folder of checkpoints, a GGUF
                         file, embedded, smollm2, the folder of a finished analysis, or a list in YAML:
                           models: [embedded, {name: runs/a/checkpoint-500, label: mine}]
                           data: {limit: 300}
                         without any: embedded, the checkpoints in examples/checkpoints, and smollm2 where installed,
                         400 sequences each
  revision=[A,B,...]     compare these revisions of the models on the Hub, such as the steps of a training
  run.dir=FOLDER         where it goes; one that holds a comparison is resumed, and models are added to it
  resume=never           make a new folder instead of resuming an unfinished comparison of the same models and settings
  key=value, --config    settings of analyze, shared by all models (rsdyn analyze --help lists them);
                         analysis.conditions=[original,untrained] by default, and similarity among the measures;
                         analysis.measures=[similarity,dsa] also compares how models move over depth (dsa-metric)
  --plan                 print what each run will need and exit; --print-config prints the comparison as a list in YAML

Exit code: 0 when all models were measured, 1 when one failed (it is named, and the others are compared), 2 for a
mistake in the command, 130 when interrupted."""
CONDITIONS = "analysis.conditions=[original,untrained]"
MEASURED = f"analysis.measures=[{','.join((*MEASURES, 'similarity'))}]"  # similarity compares models state by state
SAMPLES = "analysis.samples=400"  # of the comparison that anybody can run
OF_A_MODEL = ("lm.name", "lm.label", "lm.revision")


@dataclass
class Asked:
    """What the command line asks for; ``words`` are the settings of analyze, files among them."""

    models: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)
    directory: str | None = None
    name: str | None = None
    resume: bool = True
    plan: bool = False
    print_config: bool = False


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, and return the exit code."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--help" in given or "-h" in given:
        print(USAGE)
        return 0
    with unbroken_output():
        try:
            return _main(read_words(given))
        except UserError as error:
            print(f"rsdyn compare: error: {in_keys(error)}", file=sys.stderr)
            return error.exit_code
        except (Interrupted, KeyboardInterrupt) as asked:
            print("\nrsdyn compare: interrupted; the same command resumes", file=sys.stderr)
            return getattr(asked, "exit_code", 130)


def _main(asked: Asked) -> int:
    entries, words, notes = find_all(asked)
    check_settings(words, entries)
    if asked.print_config:
        print(described(entries, words), end="")
        return 0
    if asked.plan:
        return run_plan(entries, words)
    job = open_job(entries, words, directory=asked.directory, name=asked.name, resume=asked.resume)
    for note in notes:
        print(note)
    print(f"Comparing {len(entries)} models in {job.folder}", flush=True)
    try:
        models = run_all(job, lambda line: print(line, flush=True))
        if any(model.states for model in models):
            print("Comparing how the models move over depth", flush=True)
        found = compare(models)
        report(job, found)
    finally:
        job.held.lock.release()
    return 1 if found.failed else 0


def report(job: Job, found: Comparison) -> None:
    """Write the page and the tables, and print what they begin with."""
    from rsdyn.report.comparison import write_comparison

    write_comparison(job.folder, found)
    write_text(job.folder / "comparison.md", as_markdown(found))
    write_json(job.folder / JSON, as_json(found))
    print()
    for line in [*answer(found), "", *as_text(found)]:
        print(line)
    print()
    for label, reason in found.failed.items():
        print(f"Failed:      {label}: {reason}")
    print(f"Folder:      {job.folder}")
    print(f"             comparison.html, comparison.md, {JSON}, figures/; each run in models/, with its {SUMMARY}")


# -- the command line --------------------------------------------------------------------------------------------------


def read_words(argv: Sequence[str]) -> Asked:
    """Sort the words of the command line; ``UserError`` for one that a comparison does not take."""
    asked = Asked()
    rest = iter(argv)
    for word in rest:
        key, equals, value = word.partition("=")
        if word == PLAN:
            asked.plan = True
        elif word == "--print-config":
            asked.print_config = True
        elif key == "--config":
            asked.words += [word] if equals else [word, next(rest, "")]
        elif word.startswith("-"):
            raise UserError(f"{word}: there is no such flag. Run rsdyn compare --help.")
        elif not equals or Path(word).expanduser().exists():
            asked.models.append(word)
        elif key == "revision":
            asked.revisions = [part.strip(" '\"") for part in value.strip("[] ").split(",") if part.strip(" '\"")]
        elif key == "run.dir":
            asked.directory = value
        elif key == "run.name":
            asked.name = value
        elif key == "resume":
            if value not in ("auto", "never"):
                raise UserError(f"resume={show(value)} is not allowed: a comparison takes auto or never.")
            asked.resume = value == "auto"
        elif key in OF_A_MODEL:
            raise UserError(
                f"{word}: a comparison's models are words of their own, as in rsdyn compare NAME NAME@REVISION; "
                "labels stand in a list in YAML (rsdyn compare --help)."
            )
        else:
            asked.words.append(word)
    return asked


def find_all(asked: Asked) -> tuple[list[Entry], list[str], list[str]]:
    """The models, the settings that they share, and notes on what is not here."""
    words, notes = list(asked.words), list[str]()
    if asked.models:
        models: list[str | dict[str, Any]] = []
        for name in asked.models:
            if Path(name).suffix in (".yaml", ".yml"):
                listed, settings = read_list(Path(name).expanduser())
                models += listed
                words = [*settings, *words]
            else:
                models.append(name)
        entries = find_models(models, asked.revisions)
    elif asked.revisions:
        raise UserError("revision= needs the model whose revisions they are: rsdyn compare NAME revision=[A,B].")
    else:
        entries, notes = default_models()
        if not _sets(words, "analysis.samples"):
            words.append(SAMPLES)
    config = load_config(words, "analyze")
    if config.analysis.conditions == type(config.analysis)().conditions and not _sets(words, "analysis.conditions"):
        words.append(CONDITIONS)
    check_installed(config.analysis.measures)
    if config.analysis.measures == type(config.analysis)().measures and not _sets(words, "analysis.measures"):
        words.append(MEASURED)
    return entries, words, notes


def _sets(words: Sequence[str], key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in words)
