"""Small ICC profiles made by hand, and what they mean in numbers."""

from __future__ import annotations

import struct

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
# Columns: red, green, blue in XYZ under D50.
SRGB = np.array([[0.4360747, 0.3850649, 0.1430804], [0.2225045, 0.7168786, 0.0606169], [0.0139322, 0.0971045, 0.7141733]])
P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE = np.array([[0.6097559, 0.2052401, 0.1492240], [0.3111242, 0.6256560, 0.0632197], [0.0194811, 0.0608902, 0.7448387]])


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float | None) -> bytes:
    """A power, or sRGB's curve."""
    if gamma is not None:
        return b"para\0\0\0\0\0\0\0\0" + _fixed(gamma)
    return b"para\0\0\0\0\0\3\0\0" + b"".join(map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))


def _text(text: str) -> bytes:
    return b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text.encode() + b"\0" + bytes(78)


def _profile(space: bytes, kind: bytes, pcs: bytes, tags: dict[bytes, bytes], padding: int = 0) -> bytes:
    tags = {b"desc": _text("made for a test"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50), **tags}
    if padding:
        tags[b"xtra"] = b"data\0\0\0\0" + np.random.default_rng(0).bytes(padding)
    offset, table, body = 128 + 4 + 12 * len(tags), b"", b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    rest = kind + space + pcs + bytes(12) + b"acsp" + bytes(28) + b"".join(map(_fixed, D50)) + bytes(48)
    head = struct.pack(">I4sI", offset + len(body), b"test", 0x02400000) + rest
    return head + struct.pack(">I", len(tags)) + table + body


def rgb(primaries: np.ndarray, gamma: float | None = None, padding: int = 0) -> bytes:
    """A display's profile; `padding` bytes that cannot be packed make it as long as a table would."""
    columns = {name: _xyz(primaries[:, k]) for k, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    curves = {name: _curve(gamma) for name in (b"rTRC", b"gTRC", b"bTRC")}
    return _profile(b"RGB ", b"mntr", b"XYZ ", columns | curves, padding)


def grey(gamma: float) -> bytes:
    """A grey of a power."""
    return _profile(b"GRAY", b"mntr", b"XYZ ", {b"kTRC": _curve(gamma)})


# Of a press whose inks are no pure complements: Lab of the 16 full overprints, C M Y K from the highest bit down.
INKS = {0: (100, 0, 0), 8: (55, -37, -50), 4: (48, 74, -3), 2: (89, -5, 93), 12: (24, 22, -46), 6: (47, 68, 48), 10: (50, -65, 27)}


def cmyk() -> bytes:
    """A press: between the corners it mixes in proportion."""
    table = b""
    for node in range(16):
        lightness, a, b = INKS.get(node, (16.0, 0.0, 0.0))
        table += bytes([round(lightness * 2.55), round(a + 128), round(b + 128)])
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + b"".join(map(_fixed, np.eye(3).ravel())) + 4 * ramp + table + 3 * ramp
    return _profile(b"CMYK", b"prtr", b"Lab ", {b"A2B0": lut, b"A2B1": lut})


def _decoded(values: np.ndarray, gamma: float | None) -> np.ndarray:
    if gamma is not None:
        return values**gamma
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def _encoded(linear: np.ndarray) -> np.ndarray:
    linear = linear.clip(0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def in_srgb(colour: tuple[int, ...], primaries: np.ndarray, gamma: float | None = None) -> np.ndarray:
    """The 8-bit sRGB of a colour of such a display, by the definition."""
    xyz = primaries @ _decoded(np.array(colour) / 255, gamma)
    return 255 * _encoded(np.linalg.solve(SRGB, xyz))


def lab_in_srgb(lightness: float, a: float, b: float) -> np.ndarray:
    """The 8-bit sRGB of a Lab colour under D50."""
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    xyz = D50 * np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    return 255 * _encoded(np.linalg.solve(SRGB, xyz))
