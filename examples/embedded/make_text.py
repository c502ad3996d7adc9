"""Make the English paragraphs that the embedded language model is trained and measured on.

Reads Debian packages (`apt-get download NAME...`), keeps running prose only, splits it by document into training,
validation and held-out paragraphs, and writes three JSON-lines files: `train.jsonl` and `valid.jsonl` into the output
folder, and the held-out `text.jsonl`, which ships with rsdyn, where `--held-out` says.

    python -m examples.embedded.make_text DEBS OUT [--held-out rsdyn/embedded/text.jsonl]

A row is one paragraph: `text`, `source` (Debian package, or family of packages), `document` (the unit of the split).
Standard library only, except that the bible is decoded by its own program, from the package `bible-kjv`.
"""

import argparse
import gzip
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from rsdyn.embedded import TEXT

Row = dict[str, str]


@dataclass(frozen=True)
class Source:
    """Where one source's documents lie and how many of its paragraphs are held out."""

    name: str
    """Debian package; a trailing `*` takes every package whose name starts so."""
    files: str
    """Pattern below the unpacked package."""
    reader: str
    """Key of `READERS`."""
    held_out: int = 0
    """Paragraphs to hold out; 0 for sources that only train."""
    ships: bool = True
    """Whether the held-out paragraphs may be given on with rsdyn: those under the GPL alone are not."""


SOURCES = (
    Source("bible-kjv-text", "usr/lib/bible.data", "bible", held_out=2000),
    Source(
        "wesnoth-1.16-*",
        "usr/share/games/wesnoth/1.16/data/campaigns/**/*.cfg",
        "wesnoth",
        held_out=900,
        ships=False,
    ),
    Source("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", "jargon", held_out=700),
    Source("dict-devil", "usr/share/dictd/devil.dict.dz", "devil", held_out=200),
    Source("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/*.html", "html", held_out=650),
    Source("perl-doc", "usr/share/perl/*/pod/*.pod", "pod", held_out=900),
    Source("python3.11-doc", "usr/share/doc/python3.11/html/[!_]*/*.html", "html", held_out=600),
    Source("postgresql-doc-15", "usr/share/doc/postgresql-doc-15/html/*.html", "html", held_out=600),
    Source("git-doc", "usr/share/doc/git-doc/**/*.html", "html", held_out=150, ships=False),
    Source("debian-reference-en", "usr/share/debian-reference/*.en.html", "html", held_out=150, ships=False),
    Source("debian-policy", "usr/share/doc/debian-policy/policy.html/*.html", "html", held_out=100, ships=False),
    Source("developers-reference", "usr/share/developers-reference/*.html", "html", held_out=100, ships=False),
    Source("linux-doc-6.1", "usr/share/doc/linux-doc-6.1/html/[!_]*/**/*.html", "html"),
    Source("python-django-doc", "usr/share/doc/python-django-doc/html/[!_]*/**/*.html", "html"),
    Source("rust-doc", "usr/share/doc/rust-doc/html/[bcenru]*[!es]/[!_]*.html", "html"),
    Source("sqlite3-doc", "usr/share/doc/sqlite3/*.html", "html"),
    Source("apache2-doc", "usr/share/doc/apache2-doc/manual/en/**/*.html*", "html"),
    Source("debian-faq", "usr/share/doc/debian/FAQ/*.en.html", "html"),
    Source("harden-doc", "usr/share/doc/harden-doc/html/en-US/*.html", "html"),
)

COMMON_WORDS = frozenset(
    "the of and to a in is it that for as with this be are on not or by an from was he his i they you have which unto"
    " all but if at will can shall we my me so him their had were who her she has your when there no do what".split()
)


def is_prose(paragraph: str) -> bool:
    """True for a sentence or more of English: common words, mostly letters, an end mark.

    Lists of names, formulas, headings, signatures of functions and other languages fail one of the three.
    """
    words = re.findall(r"[^\W\d_]+", paragraph.lower())
    if not (len(words) >= 6 and 30 <= len(paragraph) <= 4000):
        return False
    letters = sum(character.isalpha() or character in " ,.;:'’" for character in paragraph)
    common = sum(word in COMMON_WORDS for word in words)
    return (
        letters >= 0.9 * len(paragraph) and common >= 0.2 * len(words) and paragraph.rstrip("\"'”’)]")[-1:] in ".!?:;,"
    )


def squeeze(text: str) -> str:
    """Put every run of white space, no-break spaces included, down to one space."""
    return " ".join(text.split())


class _ProseParser(HTMLParser):
    """Collects the text of `<p>` and of DocBook's `<div class="para">`, and nothing inside code, tables or menus."""

    SKIPPED_TAGS = frozenset("pre table nav header footer script style head form title svg math".split())
    SKIPPED_CLASSES = frozenset(
        "sphinxsidebar related navheader navfooter toc footer highlight headerlink copyright wy-nav-side sidetoc"
        " admonition-title title pagefooter qv translate fname figcaption wy-side-nav-search".split()
    )
    BLOCKS = frozenset(
        "p div ul ol dl li dd dt h1 h2 h3 h4 h5 h6 blockquote section article main aside figure body hr".split()
    )

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._words: list[str] | None = None
        self._skipped, self._depth = "", 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self._depth:
            self._depth += tag == self._skipped
            return
        classes = set((dict(attrs).get("class") or "").split())
        if tag in self.SKIPPED_TAGS or classes & self.SKIPPED_CLASSES:
            if tag not in {"a", "span"}:
                self.flush()
            self._skipped, self._depth = tag, 1
        elif tag in self.BLOCKS:
            self.flush()
            if tag == "p" or (tag == "div" and "para" in classes):
                self._words = []
        elif tag == "br":
            self.handle_data(" ")

    def handle_endtag(self, tag: str) -> None:
        if self._depth:
            self._depth -= tag == self._skipped
        elif tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if self._words is not None and not self._depth:
            self._words.append(data)

    def flush(self) -> None:
        if self._words:
            self.paragraphs.append(squeeze("".join(self._words)))
        self._words = None


def html_paragraphs(html: str) -> list[str]:
    """Return the paragraphs of a page, without code blocks, tables, headings and navigation."""
    parser = _ProseParser()
    parser.feed(html)
    parser.flush()
    return [paragraph for paragraph in parser.paragraphs if paragraph]


def pod_paragraphs(pod: str) -> list[str]:
    """Return the ordinary paragraphs of a POD document (perlpodspec), formatting codes resolved to their text."""
    paragraphs, skipping = [], False
    for block in re.split(r"\n\s*\n", pod):
        block = block.strip("\n")
        if block.startswith("="):
            if block.startswith(("=begin", "=end")):
                skipping = block.startswith("=begin")
        elif block and not block[0].isspace() and not skipping:
            paragraphs.append(squeeze(_resolve_pod_codes(block)))
    return paragraphs


def _resolve_pod_codes(text: str) -> str:
    entities = {"lt": "<", "gt": ">", "sol": "/", "verbar": "|"}

    def resolve(match: re.Match[str]) -> str:
        code, inner = match[1], (match[3] if match[2] is None else match[2].strip())
        if code == "L":
            label, bar, target = inner.partition("|")
            return label if bar else target or label.strip("/").replace("/", " in ").replace('"', "")
        if code == "E":
            return {"<": "\0", ">": "\1"}.get(entities.get(inner, inner), entities.get(inner, inner))
        return "" if code in "XZ" else inner.replace("<", "\0").replace(">", "\1")

    # Codes nest, so resolve the innermost until none is left; kept angle brackets wait as \0 and \1 meanwhile.
    pattern = re.compile(r"\b([A-Z])(?:<<+ (.*?) >>+|<([^<>]*)>)", re.DOTALL)
    for _ in range(8):
        text, changes = pattern.subn(resolve, text)
        if not changes:
            break
    return text.replace("\0", "<").replace("\1", ">")


def read_html(path: Path, _: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield a page as one document."""
    yield f"{path.parent.name}/{path.stem}", html_paragraphs(path.read_text("utf-8", errors="replace"))


def read_pod(path: Path, _: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield a manual page as one document."""
    yield path.stem, pod_paragraphs(path.read_text("utf-8", errors="replace"))


def read_wesnoth(path: Path, _: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield a scenario of a Battle for Wesnoth campaign: its narration and speeches."""
    strings = re.findall(r'\b(?:story|message)\s*=\s*_\s*"((?:[^"]|"")*)"', path.read_text("utf-8", errors="replace"))
    text = "\n\n".join(re.sub(r"<[^<>]*>|^\s*#.*$", "", string.replace('""', '"')) for string in strings)
    yield f"{path.parent.parent.name}/{path.stem}", [squeeze(part) for part in re.split(r"\n\s*\n", text)]


def read_bible(path: Path, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield the books; one to four verses of a chapter make a paragraph, so that the lengths vary as prose's do."""
    program = path.parents[3] / "bible-kjv/usr/bin/bible"
    command = [str(program.resolve()), "-f", "-p", str(path.parent), "gen1:1-rev22:21"]
    verses = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout
    books: dict[str, list[str]] = {}
    chapter, wanted = ("", ""), 0
    paragraph: list[str] = []
    for book, number, verse in re.findall(r"^(\w+?)(\d+):\d+ (.*)$", verses, re.MULTILINE):
        if len(paragraph) == wanted or (book, number) != chapter:
            if paragraph:
                books.setdefault(chapter[0], []).append(squeeze(" ".join(paragraph)))
            chapter, wanted, paragraph = (book, number), rng.choices((1, 2, 3, 4), (3, 4, 2, 1))[0], []
        paragraph.append(verse)
    books[chapter[0]].append(squeeze(" ".join(paragraph)))
    yield from books.items()


def dictionary_blocks(text: str, headword: str, verse: str, entries: int = 25) -> Iterator[tuple[str, list[str]]]:
    """Yield blocks of consecutive entries of a dictionary, without paragraphs that match `verse` (poems, tables)."""
    block: list[str] = []
    count = 0
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if re.match(headword, paragraph):
            count += 1
            if count % entries == 0:
                yield f"entries-{count // entries:03d}", block
                block = []
        if not re.match(verse, paragraph):
            block.append(squeeze(re.sub(r"[{}]", "", paragraph)))
    yield f"entries-{count // entries + 1:03d}", block


def read_jargon(path: Path, _: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield blocks of the Jargon File; its headwords stand alone as `:word:` with the pronunciation."""
    yield from dictionary_blocks(gzip.decompress(path.read_bytes()).decode("utf-8"), r" *:.+:", r" *:.+:|.*[─│]| {5}")


def read_devil(path: Path, _: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Yield blocks of The Devil's Dictionary; an entry opens with its capitalised headword, a poem is indented."""
    text = gzip.decompress(path.read_bytes()).decode("utf-8", errors="replace")
    yield from dictionary_blocks(text[text.find("ABASEMENT") :], r"[A-Z'-]{2,},", r"\s")


READERS = {
    "html": read_html,
    "pod": read_pod,
    "wesnoth": read_wesnoth,
    "bible": read_bible,
    "jargon": read_jargon,
    "devil": read_devil,
}


def unpack(debs: Path, packages: Path) -> None:
    """Unpack every `.deb` of a folder into a folder of its package's name."""
    for deb in sorted(debs.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", deb, packages / deb.name.split("_")[0]], check=True)


def read_source(source: Source, packages: Path, seen: set[str], seed: int) -> list[list[Row]]:
    """Return the documents of a source, each a list of rows; a paragraph that was seen before is left out."""
    documents = []
    for path in sorted(packages.glob(f"{source.name}/{source.files}")):
        # "print" and "developers-reference" are whole books on one page, beside their chapters.
        if path.is_symlink() or "translations" in path.parts or path.stem in {"print", "developers-reference"}:
            continue
        # Seeded by the path, so that one more file in a package does not change what becomes of the others.
        for document, paragraphs in READERS[source.reader](path, random.Random(f"{seed}/{path.name}")):
            rows = []
            for text in paragraphs:
                if is_prose(text) and text not in seen:
                    seen.add(text)
                    rows.append({"text": text, "source": source.name, "document": document})
            if rows:
                documents.append(rows)
    return documents


def split(documents: list[list[Row]], wanted: int, rng: random.Random) -> tuple[list[list[Row]], list[list[Row]]]:
    """Take whole documents at random until about `wanted` rows are held out; return these and the rest."""
    taken: list[list[Row]] = []
    rest: list[list[Row]] = []
    count = 0
    for rows in rng.sample(documents, len(documents)):
        fits = count < wanted and count + len(rows) <= 1.1 * wanted
        (taken if fits else rest).append(rows)
        count += len(rows) * fits
    return taken, rest


def interleave(documents: list[list[Row]], rng: random.Random) -> Iterator[Row]:
    """Merge documents at random: each keeps its order, and every stretch of rows is a mix of all."""
    order = [index for index, rows in enumerate(documents) for _ in rows]
    rng.shuffle(order)
    remaining = [iter(rows) for rows in documents]
    return (next(remaining[index]) for index in order)


def without(documents: list[list[Row]], unseen: list[Row]) -> list[list[Row]]:
    """Drop every document that `unseen` has a paragraph of, and every paragraph that it has word for word."""
    theirs = {(row["source"], row["document"]) for row in unseen}
    texts = {row["text"] for row in unseen}
    others = [rows for rows in documents if (rows[0]["source"], rows[0]["document"]) not in theirs]
    return [kept for rows in others if (kept := [row for row in rows if row["text"] not in texts])]


def read_jsonl(path: Path) -> list[Row]:
    """Read the rows that `write_jsonl` wrote."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_jsonl(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as JSON lines and return their number."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines), "utf-8")
    return len(lines)


def main(argv: list[str] | None = None) -> None:
    """Unpack the packages, extract the prose and write the three files."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("debs", type=Path, help="folder with the downloaded .deb files")
    parser.add_argument("out", type=Path, help="folder for train.jsonl and valid.jsonl")
    parser.add_argument("--held-out", type=Path, default=TEXT, help="file for the held-out rows")
    parser.add_argument("--cap", type=float, default=2.0, help="most training text of one manual, million characters")
    parser.add_argument("--unseen", type=Path, help="JSON lines whose documents neither file for training may hold")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    unseen = read_jsonl(options.unseen) if options.unseen else []
    options.out.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(options.seed), set[str]()
    train, valid, held_out = list[list[Row]](), list[list[Row]](), list[list[Row]]()
    with tempfile.TemporaryDirectory() as folder:
        unpack(options.debs, Path(folder))
        for source in SOURCES:
            documents = without(read_source(source, Path(folder), seen, options.seed), unseen)
            taken, documents = split(documents, source.held_out, rng)
            checked, documents = split(documents, source.held_out // 6, rng)
            size, kept = 0, []
            for rows in documents:  # in the random order of `split`
                # Manuals are easy to come by; without a cap they drown the bible and the stories.
                if size < 1e6 * options.cap or source.reader not in {"html", "pod"}:
                    kept.append(rows)
                    size += sum(len(row["text"]) for row in rows)
            counts = ", ".join(f"{sum(map(len, part)):6d}" for part in (taken, checked, kept))
            print(
                f"{source.name:24s} rows held out, for validation, for training {counts}; {size / 1e6:.2f} M characters"
            )
            held_out, valid, train = held_out + taken, valid + checked, train + kept
    kept_back = {source.name for source in SOURCES if not source.ships}
    write_jsonl(options.held_out, (row for row in interleave(held_out, rng) if row["source"] not in kept_back))
    write_jsonl(options.out / "valid.jsonl", (row for rows in valid for row in rows))
    write_jsonl(options.out / "train.jsonl", (row for rows in train for row in rows))


if __name__ == "__main__":
    main()
