"""What never goes into an artifact, and the name of a checkpoint whose run is not known (the rest: test_show.py)."""

import json

import pytest

from rsdyn import artifacts


class Keeper:
    """A logger whose run keeps the artifacts."""

    def __init__(self):
        self.lost, self.kept, self.experiment, self.id = {}, [], self, "abcd1234"

    def _log_artifact(self, artifact, *, is_user_created, use_after_commit):
        self.kept.append((artifact, use_after_commit))


def test_a_file_that_is_too_large_is_not_uploaded_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "MAX_BYTES", 10)
    (tmp_path / "results.npz").write_bytes(b"x" * 11)
    (tmp_path / "summary.json").write_text("{}")
    logger = Keeper()
    artifacts.log_results(logger, tmp_path)
    assert logger.kept == []
    (said,) = logger.lost.values()
    assert said.startswith("results.npz has")


@pytest.mark.parametrize(
    ("provenance", "name"),
    [('{"wandb_id": "12ab34cd"}', "checkpoint-12ab34cd"), ('{"wandb_id": "../x"}', None), ("[1]", None), (None, None)],
)
def test_a_checkpoint_is_called_by_its_run_or_else_by_its_contents(tmp_path, provenance, name):
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"weights")
    if provenance:
        (tmp_path / "run" / "provenance.json").write_text(provenance)
    logger = Keeper()
    artifacts.use_checkpoint(logger, path)
    ((artifact, uses),) = logger.kept
    assert uses and artifact.type == "model" and list(artifact.manifest.entries) == ["best.ckpt"]
    other = tmp_path / "other"
    other.write_bytes(b"weights!")
    artifacts.use_checkpoint(logger, other)
    if name:
        assert artifact.name == name
    else:
        assert len(artifact.name) == len("checkpoint-") + 16 and artifact.name != logger.kept[1][0].name


def test_the_metadata_is_redacted(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "correct horse battery")
    (tmp_path / "best.ckpt").write_bytes(b"weights")
    logger = Keeper()
    artifacts.log_checkpoint(logger, tmp_path / "best.ckpt", lm="correct horse battery", widths=[4, 2])
    ((artifact, uses),) = logger.kept
    assert not uses and artifact.name == "checkpoint-abcd1234"
    assert "horse" not in json.dumps(artifact.metadata) and artifact.metadata["widths"] == [4, 2]


def test_without_a_logger_or_a_cache_nothing_happens(tmp_path):
    logger = Keeper()
    artifacts.log_cache(logger, None, recorded=True)
    artifacts.log_cache(None, None, recorded=True)
    artifacts.log_results(None, tmp_path)
    artifacts.log_checkpoint(None, tmp_path)
    artifacts.use_checkpoint(None, tmp_path)
    assert logger.kept == [] and logger.lost == {}
