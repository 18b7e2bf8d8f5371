"""The yardstick is what xz makes of the same bytes."""

import hashlib
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


def test_of_a_held_out_share_it_takes_the_documents_of_each_side(tmp_path):
    data = recipe.load(recipes.on_disk(tmp_path), ["data.held_out={from: train, one_in: 4}"]).data
    sides = {True: b"", False: b""}
    for text in recipes.texts(200, seed=1):
        sides[int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) % 4 == 0] += text.encode()
    got = xz_bits_per_byte(data)
    bits = 8 / len(sides[True])
    assert got["xz_bits_per_byte"] == pytest.approx(xz(sides[True]) * bits)
    conditional = (xz(sides[False] + sides[True]) - xz(sides[False])) * bits
    assert got["xz_conditional_bits_per_byte"] == pytest.approx(conditional)
