"""A student wrapped for several processes has the gradients of one process with all of the data."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distill.batches import batch_of, gradients_of
from tests.distill.wrapped_student import student_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pair(model_folder, tmp_path):
    """A function that makes a teacher and its student, of a family, in a folder."""

    def make(family):
        shutil.copytree(model_folder(family, layers=4), tmp_path / "teacher")
        shutil.copytree(model_folder(family), tmp_path / "student")
        return tmp_path

    return make


def launch(folder, kind):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += [str(ROOT / "tests/distill/wrapped_student.py"), str(folder), kind]
    out = folder / "gradients.pt"
    settings = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(out)], env=settings, cwd=folder, capture_output=True, text=True
    )
    return done, torch.load(out) if out.exists() else None


# Llama's head is tied to the embeddings here, Qwen2's is not.
@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "ddp"), ("llama", "fsdp"), ("qwen2", "fsdp-bfloat16")]
)
def test_gradients_are_those_of_one_process(pair, family, kind):
    folder = pair(family)
    done, found = launch(folder, kind)
    assert done.returncode == 0, done.stderr
    student = student_of(folder)
    student(**batch_of(4)).total.backward()
    expected = gradients_of(student)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        # float32 in another order; or all of it in bfloat16, where a loss of noise is not small
        if kind == "fsdp-bfloat16":
            cosine = torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
            assert cosine > 0.98, name
        else:
            torch.testing.assert_close(found[name] / scale, gradient / scale, rtol=1e-3, atol=1e-5)


def test_a_head_that_is_sharded_by_itself_is_refused(pair):
    done, found = launch(pair("qwen2"), "fsdp-head")
    assert done.returncode != 0
    assert found is None
    assert "the head's weight is sharded by itself" in done.stderr
