"""Hashes behind a merge: which one is computed, and what is said of a file that is not what its record says."""

import hashlib
from contextlib import closing

import pytest
import xxhash

from distmerge.errors import UserError
from distmerge.files.digests import Digests
from distmerge.files.manifest import as_json, entry_of, sealed
from distmerge.files.models import open_model, recorded_files
from tests.files.models import family

CONTENT = bytes(range(256)) * 5000 + b"odd"


def test_an_entry_has_the_size_and_both_hashes(tmp_path):
    (tmp_path / "file").write_bytes(CONTENT)
    assert entry_of(tmp_path / "file") == {
        "bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "xxh128": xxhash.xxh128(CONTENT).hexdigest(),
    }


@pytest.mark.parametrize("kinds", [{"sha256", "xxh128"}, {"sha256"}])
def test_a_recorded_file_must_be_what_its_record_says(kinds, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(CONTENT)
    recorded = {key: value for key, value in entry_of(file).items() if key in kinds | {"bytes"}}
    with closing(Digests(2, {file: recorded})) as digests:
        digests.advance(file, 1000)
        assert digests.finish() == {file: {"bytes": len(CONTENT), "sha256": recorded["sha256"]}}
    hash_name = "XXH128" if "xxh128" in kinds else "SHA-256"
    for content, name in ((CONTENT[:-1] + b"e", hash_name), (CONTENT[:-1], "size")):
        file.write_bytes(content)
        with closing(Digests(1, {file: recorded})) as digests:
            digests.advance(file)
            with pytest.raises(UserError, match=f"file does not have the {name} in the record beside it"):
                digests.finish()


def test_a_record_that_was_changed_is_refused(tmp_path):
    """Else its SHA-256, which nothing computes again where there is an XXH128, would go on into merge.json."""
    model = family(tmp_path)[0]
    record = as_json(sealed({"files": {"model.safetensors": entry_of(model / "model.safetensors")}}))
    for changed in (
        record.replace(b'"sha256": "', b'"sha256": "f', 1),
        record[:-3],
        b"[]",
        b"{}",
        as_json(sealed({"step": 1})),
    ):
        (model / "block.json").write_bytes(changed)
        with pytest.raises(
            UserError, match=r"block.json cannot be read \(.*\); remove it to merge the model without its hashes"
        ):
            open_model(str(model))


def test_records_of_several_models(tmp_path):
    models = family(tmp_path)
    file = models[0] / "model.safetensors"
    (models[0] / "block.json").write_bytes(as_json(sealed({"files": {file.name: entry_of(file)}})))
    assert recorded_files([open_model(str(model)) for model in models]) == {file: entry_of(file)}
