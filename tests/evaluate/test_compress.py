"""The yardstick is what xz makes of the same bytes."""

import lzma
import shutil
import subprocess

import pytest
import recipes

from jllama.config import recipe
from jllama.evaluate.compress import xz_bits_per_byte


def xz(text: bytes) -> int:
    if shutil.which("xz"):
        command = ["xz", "-9", "-T1", "--stdout"]
        return len(subprocess.run(command, input=text, capture_output=True, check=True).stdout)
    return len(lzma.compress(text, preset=9))


def test_it_is_xz_of_the_concatenated_documents(tmp_path):
    data = recipe.load(recipes.on_disk(tmp_path)).data
    train = "".join(recipes.texts(200, seed=1)).encode()
    held_out = "".join(recipes.texts(12, seed=2)).encode()
    got = xz_bits_per_byte(data)
    bits = 8 / len(held_out)
    assert got["xz_bits_per_byte"] == pytest.approx(xz(held_out) * bits)
    conditional = (xz(train + held_out) - xz(train)) * bits
    assert got["xz_conditional_bits_per_byte"] == pytest.approx(conditional)
    assert conditional < got["xz_bits_per_byte"]
