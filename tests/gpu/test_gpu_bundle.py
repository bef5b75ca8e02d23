"""The bundle: stripping of fat binaries, cutting into parts, what the installer says and does."""

from __future__ import annotations

import json
import struct
import sys
import tarfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import verl_heddle
from bench.gpu import fatbin, install, loading, parts

ROOT = Path(__file__).resolve().parents[2]
IMAGE_HEADER = 64
images = st.lists(
    st.tuples(st.sampled_from([fatbin.PTX, fatbin.MACHINE_CODE]), st.sampled_from([75, 80, 86, 89, 90, 100, 120]), st.integers(1, 40)),
    max_size=6,
)


def binary(made: list[tuple[int, int, int]]) -> bytes:
    """A fat binary as the CUDA toolchain lays it out; payloads are not zero."""
    body = b""
    for kind, arch, size in made:
        header = bytearray(IMAGE_HEADER)
        struct.pack_into("<HHIQ", header, 0, kind, 0, IMAGE_HEADER, size)
        struct.pack_into("<I", header, fatbin.ARCH_OFFSET, arch)
        body += bytes(header) + bytes([arch] * size)
    return fatbin.MAGIC + struct.pack("<HHQ", 1, fatbin.HEADER_SIZE, len(body)) + body


def library(groups: list[list[tuple[int, int, int]]], junk: bytes = b"elf") -> bytes:
    return junk + junk.join(binary(group) for group in groups) + junk


@given(st.lists(images, min_size=1, max_size=4))
def test_strip_keeps_exactly_what_sm90_can_use(groups):
    data = bytearray(library(groups))
    before = bytes(data)
    report = fatbin.strip(data, 90)
    left = fatbin.remaining(data)
    wanted = {}
    for group in groups:
        compiled = any(kind == fatbin.MACHINE_CODE and arch == 90 for kind, arch, _ in group)
        for kind, arch, size in group:
            if (kind == fatbin.MACHINE_CODE and arch == 90) or (kind == fatbin.PTX and arch <= 90 and not compiled):
                name = f"{'PTX' if kind == fatbin.PTX else 'sm'}_{arch}"
                wanted[name] = wanted.get(name, 0) + size
    assert dict(left) == wanted == dict(report.kept)
    assert sum(report.found.values()) == sum(size for group in groups for _, _, size in group)
    assert loading.same_outside(before, bytes(data))


def test_a_change_outside_of_images_is_noticed():
    data = bytearray(library([[(fatbin.MACHINE_CODE, 90, 8), (fatbin.MACHINE_CODE, 80, 8)]]))
    before = bytes(data)
    fatbin.strip(data, 90)
    assert loading.same_outside(before, bytes(data))
    data[0] ^= 1
    assert not loading.same_outside(before, bytes(data))
    assert not loading.same_outside(before, bytes(data) + b"x")


def test_a_kernel_changed_instead_of_blanked_is_noticed():
    before = library([[(fatbin.MACHINE_CODE, 90, 8)]])
    changed = bytearray(before)
    changed[changed.rfind(bytes([90] * 8))] = 1
    assert not loading.same_outside(before, bytes(changed))


@given(st.binary(max_size=64))
def test_the_magic_number_by_chance_breaks_nothing(noise):
    data = bytearray(fatbin.MAGIC + noise + fatbin.MAGIC)
    before = bytes(data)
    assert fatbin.strip(data, 90).kept.total() >= 0
    assert len(data) == len(before)


@given(st.integers(0, 10_000), st.integers(1, 500))
def test_sizes_are_few_equal_and_below_the_limit(total, limit):
    made = parts.sizes(total, limit)
    assert sum(made) == total
    assert max(made) <= limit
    assert max(made) - min(made) <= 1
    assert len(made) == max(1, -(-total // limit))


def bundle(folder: Path, limit: int) -> dict:
    """An archive of two files in parts below `limit`, with a manifest."""
    source = folder / "source"
    source.mkdir(parents=True)
    (source / "a.py").write_text("x = 1\n" * 500)
    (source / "b.bin").write_bytes(bytes(range(256)) * 30)
    archive = folder / "heddle-gpu-engine.tar.xz"
    with tarfile.open(archive, "w:xz") as file:
        file.add(source, arcname=".")
    entry = parts.split(archive, limit)
    (folder / parts.MANIFEST).write_text(json.dumps({"archives": [entry]}))
    archive.unlink()
    return entry


def test_unpack_gives_the_files_back(tmp_path):
    entry = bundle(tmp_path / "cache", 200)
    assert len(entry["parts"]) > 2 and all(part["bytes"] <= 200 for part in entry["parts"])
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    for number, part in enumerate(entry["parts"]):  # they arrive in different folders
        (tmp_path / "cache" / part["name"]).rename((one if number % 2 else two) / part["name"])
    (tmp_path / "cache" / parts.MANIFEST).rename(two / parts.MANIFEST)
    install.unpack("engine", [one, two], tmp_path / "dest")
    assert (tmp_path / "dest/b.bin").read_bytes() == bytes(range(256)) * 30
    assert not list((tmp_path / "dest").glob("*.tar.xz"))


def test_a_missing_and_a_torn_part_are_named(tmp_path):
    entry = bundle(tmp_path / "cache", 200)
    first, second = (tmp_path / "cache" / part["name"] for part in entry["parts"][:2])
    torn = first.read_bytes()
    first.write_bytes(torn[:-1] + b"?")
    with pytest.raises(parts.BundleError, match=f"{first.name} is damaged"):
        install.unpack("engine", [tmp_path / "cache"], tmp_path / "dest")
    first.write_bytes(torn)
    second.unlink()
    assert parts.missing(entry, [tmp_path / "cache"]) == [second.name]
    with pytest.raises(parts.BundleError, match=second.name):
        install.unpack("engine", [tmp_path / "cache"], tmp_path / "dest")
    with pytest.raises(parts.BundleError, match="there is engine"):
        install.unpack("rest", [tmp_path / "cache"], tmp_path / "dest")
    with pytest.raises(parts.BundleError, match=parts.MANIFEST):
        install.unpack("engine", [tmp_path], tmp_path / "dest")


def test_the_plugin_is_found_where_it_was_put(tmp_path):
    """By verl's entry point, without a build tool."""
    install.plug_in(tmp_path)
    found = PathDistribution(next(tmp_path.glob("*.dist-info")))
    assert found.metadata["Name"] == "verl-heddle"
    point = next(one for one in found.entry_points if one.group == "verl.plugins")
    assert point.value == "verl_heddle.verl_plugin.plugin"
    assert found.version == verl_heddle.__version__
    assert str(ROOT) in install.write_environment(tmp_path).read_text()


def test_the_installer_says_what_this_host_lacks(monkeypatch, tmp_path):
    monkeypatch.setattr(install, "_version", lambda name: {"torch": "2.10.0"}.get(name, "missing"))
    told = "\n".join(install.complaints(tmp_path))
    assert "torch is 2.10.0, wanted 2.11.0" in told
    assert "missing, and not in the bundle" in told and "scipy" in told
