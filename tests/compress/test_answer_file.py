"""An output that is filled in any order, broken off, and gone on with."""

import pytest

from compress.answer_file import AnswerFile
from compress.core.errors import InputError


def opened(out, identity=None, restart=False):
    output = AnswerFile(out, overwrite=False)
    output.progress.mkdir(exist_ok=True)
    output.begin(identity or {}, restart)
    return output


def test_what_was_cut_off_is_dropped_and_nothing_after_it_is_lost(tmp_path):
    out = tmp_path / "out"
    first = opened(out)
    list(first.keep(iter([{"index": 2}, {"index": 0, "text": "é"}])))
    path = first.progress / "answers.jsonl"
    path.write_bytes(path.read_bytes()[:-3])
    second = opened(out)
    assert list(second.done) == [2]
    list(second.keep(iter([{"index": 1}, {"index": 0, "text": "ö"}])))
    third = opened(out)
    assert set(third.done) == {0, 1, 2}
    third.finish()
    assert out.read_text("utf-8") == '{"index": 0, "text": "ö"}\n{"index": 1}\n{"index": 2}\n'
    assert not third.progress.exists()


def test_restart_drops_what_was_kept(tmp_path):
    list(opened(tmp_path / "out", {"input": "a"}).keep(iter([{"index": 0}])))
    with pytest.raises(InputError, match=r"another input \(a, now b\); .* pass --restart"):
        opened(tmp_path / "out", {"input": "b"})
    assert not opened(tmp_path / "out", {"input": "b"}, restart=True).done
