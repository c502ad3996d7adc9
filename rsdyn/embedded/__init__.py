"""The language model and the text that ship with rsdyn, so that everything runs on a bare machine."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
TEXT = Path(__file__).parent / "text.jsonl"
DOCUMENT_COLUMN = "document"  # of TEXT
