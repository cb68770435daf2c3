"""The broken files under `tests/corpus`: what each is, and how it was made.

`python tests/corpus.py` writes those that are not there. The files are kept, since another version of a library would
write other bytes; a new one is added here, and `test_corpus.py` asks what is to become of it.
"""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "corpus"
RED, GREEN = (200, 30, 30), (30, 200, 30)


# Images


def picture(colour: Any = RED, mode: str = "RGB", side: int = 16) -> Image.Image:
    return Image.new(mode, (side, side), colour)


def encoded(image: Image.Image, kind: str, **how: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return stream.getvalue()


def png(width: int, height: int, bits: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG by hand, of any size that its header may claim."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def ramp16() -> Image.Image:
    """Grey of 16 bits, as bright as a grey of 8 bits with the mean 127.5."""
    return Image.fromarray((np.arange(256, dtype=np.uint16).reshape(16, 16) << 8) | 0x80)


def rotated() -> bytes:
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    return encoded(Image.new("RGB", (16, 8), RED), "JPEG", exif=exif)


def moving(kind: str) -> bytes:
    more = {"lossless": True} if kind == "WEBP" else {}
    return encoded(picture(RED), kind, save_all=True, append_images=[picture(GREEN), picture(GREEN)], **more)


def clear_palette() -> bytes:
    image = picture(1, "P")
    image.putpalette([0, 0, 0, *RED, *GREEN])
    return encoded(image, "PNG", transparency=1)


def bad_checksum() -> bytes:
    whole = bytearray(encoded(picture(), "PNG"))
    whole[29] ^= 1  # of IHDR
    return bytes(whole)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"

IMAGES: dict[str, Callable[[], bytes]] = {
    "good.png": lambda: encoded(picture(), "PNG"),
    "truncated.jpg": lambda: encoded(picture(side=64), "JPEG")[:-40],
    "truncated.png": lambda: encoded(picture(side=64), "PNG")[:60],
    "header_only.jpg": lambda: encoded(picture(), "JPEG")[:3],
    "empty.jpg": lambda: b"",
    "text.jpg": lambda: b"404 Not Found\n",
    "page.jpg": lambda: b"<!DOCTYPE html><html><body>Moved</body></html>",
    "postscript.jpg": lambda: POSTSCRIPT,
    "png_called.jpg": lambda: encoded(picture(), "PNG"),
    "cmyk.jpg": lambda: encoded(picture().convert("CMYK"), "JPEG", quality=95),
    "grey.jpg": lambda: encoded(picture(90, "L"), "JPEG"),
    "bilevel.png": lambda: encoded(picture(1, "1"), "PNG"),
    "grey16.png": lambda: encoded(ramp16(), "PNG"),
    "grey16.tiff": lambda: encoded(ramp16(), "TIFF"),
    "colour16.png": lambda: png(16, 16, 16, 2, b"".join(b"\0" + b"\xc8\xff\x1e\xff\x1e\xff" * 16 for _ in range(16))),
    "grey32.tiff": lambda: encoded(picture(70_000, "I"), "TIFF"),
    "float.tiff": lambda: encoded(picture(0.5, "F"), "TIFF"),
    "alpha.png": lambda: encoded(picture((*RED, 0), "RGBA"), "PNG"),
    "grey_alpha.png": lambda: encoded(picture((90, 0), "LA"), "PNG"),
    "clear_palette.png": clear_palette,
    "moving.gif": lambda: moving("GIF"),
    "moving.webp": lambda: moving("WEBP"),
    "moving.png": lambda: moving("PNG"),
    "rotated.jpg": rotated,
    "one_pixel.png": lambda: encoded(picture(side=1), "PNG"),
    "no_width.png": lambda: png(0, 16, 8, 2, b""),
    "claims_30000.png": lambda: png(30_000, 30_000, 8, 2, b"\0" * 64),
    "claims_all.png": lambda: png(2**31 - 1, 2**31 - 1, 8, 2, b"\0" * 64),
    "bad_checksum.png": bad_checksum,
    "too_few_rows.png": lambda: png(16, 16, 8, 2, b"\0" * 49),
    # Two megabytes of text in two kilobytes.
    "text_bomb.png": lambda: png(
        1, 1, 8, 2, b"\0" * 4, chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 21), 9))
    ),
}


# Annotations


def voc(ends: tuple[str, str, str, str], before: str = "", name: str = "dog") -> str:
    tags = "".join(f"<{tag}>{end}</{tag}>" for tag, end in zip(("xmin", "ymin", "xmax", "ymax"), ends, strict=True))
    return f"{before}<annotation><object><name>{name}</name><bndbox>{tags}</bndbox></object></annotation>"


def laughs() -> str:
    lines = ['<!ENTITY l0 "ha">', *(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))]
    return voc(("0", "0", "1", "&l9;"), f"<!DOCTYPE annotation [{''.join(lines)}]>")


XML: dict[str, Callable[[], bytes]] = {
    "good.xml": lambda: voc(("1", "2", "3", "4")).encode(),
    "billion_laughs.xml": lambda: laughs().encode(),
    "quadratic.xml": lambda: voc(
        ("0", "0", "1", "&a;" * 50), f'<!DOCTYPE annotation [<!ENTITY a "{"9" * 5000}">]>'
    ).encode(),
    "external_entity.xml": lambda: voc(
        ("1", "2", "3", "4"), '<!DOCTYPE annotation [<!ENTITY file SYSTEM "file:///etc/passwd">]>', "&file;"
    ).encode(),
    "external_dtd.xml": lambda: voc(
        ("1", "2", "3", "4"), '<!DOCTYPE annotation SYSTEM "http://localhost:9/annotation.dtd">'
    ).encode(),
    "parameter_entity.xml": lambda: voc(
        ("1", "2", "3", "4"), '<!DOCTYPE annotation [<!ENTITY % more SYSTEM "file:///etc/passwd"> %more;]>'
    ).encode(),
    "deep.xml": lambda: b"<annotation>" + b"<o>" * 5_000 + b"</o>" * 5_000 + b"</annotation>",
    "utf16.xml": lambda: voc(("1", "2", "3", "4"), '<?xml version="1.0" encoding="utf-16"?>').encode("utf-16"),
    "unknown_encoding.xml": lambda: voc(("1", "2", "3", "4"), '<?xml version="1.0" encoding="klingon"?>').encode(),
    "latin1_unsaid.xml": lambda: voc(("1", "2", "3", "4"), name="caf\xe9").encode("latin-1"),
    "zero_byte.xml": lambda: voc(("1", "2", "3", "4"), name="d\0g").encode(),
    "half.xml": lambda: voc(("1", "2", "3", "4")).encode()[:-30],
    "empty.xml": lambda: b"",
    "page.xml": lambda: b"<html><body><p>Moved</body></html>",
    "nan.xml": lambda: voc(("nan", "2", "3", "4")).encode(),
    "infinite.xml": lambda: voc(("1", "2", "1e999", "4")).encode(),
    "digits.xml": lambda: voc(("1", "2", "9" * 5000, "4")).encode(),
    "words.xml": lambda: voc(("one", "2", "3", "4")).encode(),
}


# Tables: manifests of two images, a.png and b.png

TABLES: dict[str, Callable[[], bytes]] = {
    "good.csv": lambda: b"path,label\na.png,dog\nb.png,cat\n",
    "bom_crlf.csv": lambda: b"\xef\xbb\xbfpath,label\r\na.png,dog\r\nb.png,cat\r\n",
    "quoted_line_breaks.csv": lambda: b'path,label,caption\na.png,"do\ng","two\r\nlines, ""quoted"""\nb.png,cat,x\n',
    "composed_and_not.csv": lambda: "path,label\na.png,caf\u00e9\nb.png,cafe\u0301\n".encode(),
    "lone_surrogate.csv": lambda: b'path,label,tags\na.png,dog,"[""\\ud800"", ""ok""]"\nb.png,cat,\n',
    "zero_byte.csv": lambda: b"path,label\na.png,d\0g\nb\0.png,cat\n",
    "latin1.csv": lambda: b"path,label\na.png,caf\xe9\nb.png,cat\n",
    "utf16.csv": lambda: "path,label\na.png,dog\nb.png,cat\n".encode("utf-16"),
    "semicolons.csv": lambda: b"path;label\na.png;dog\nb.png;cat\n",
    "open_quote.csv": lambda: b'path,label\na.png,"dog\nb.png,cat\n',
    "more_cells_than_columns.csv": lambda: b"path,label\na.png,dog,brown\nb.png,cat\n",
    "fewer_cells_than_columns.csv": lambda: b"path,label\na.png\nb.png,cat\n",
    "column_twice.csv": lambda: b"path,label,label\na.png,dog,wolf\nb.png,cat,cat\n",
    "no_path.csv": lambda: b"file,label\na.png,dog\n",
    "id_twice.csv": lambda: b"path,id\na.png,7\nb.png,7\n",
    "no_rows.csv": lambda: b"path,label\n",
    "empty.csv": lambda: b"",
    "picture.csv": lambda: encoded(picture(), "PNG"),
    "deep_cell.csv": lambda: b"path,boxes\na.png," + b"[" * 20_000 + b"\nb.png,[]\n",
    "cut_off.parquet": lambda: parquet()[:-20],
    "no_utf8.parquet": lambda: no_utf8(),
    "damaged.parquet": lambda: parquet().replace(b"PAR1", b"PAR0", 1)[:120] + bytes(64) + parquet()[184:],
}


def parquet(**how: Any) -> bytes:
    import polars as pl

    stream = io.BytesIO()
    pl.DataFrame({"path": ["a.png", "b.png"], "label": ["dog", "cat"]}).write_parquet(stream, **how)
    return stream.getvalue()


def no_utf8() -> bytes:
    """Texts of bytes that are none, for which polars panics."""
    whole = parquet(compression="uncompressed")
    return whole.replace(b"a.png", b"\xff\xff\xff\xff\xff", 1)


BOXES = {
    "inside": "[[0, 0, 8, 16]]",
    "touching": "[[0, 0, 16, 8]]",
    "fraction": "[[0.5, 0.5, 7.2, 15.9]]",
    "minus_zero": "[[-0.0, 0, 8, 16]]",
    "twice": "[[0, 0, 8, 16], [0, 0, 8, 16]]",
    "none": "[]",
    "all": "[[0, 0, 16, 16]]",
    "inverted": "[[8, 0, 0, 16]]",
    "inverted_y": "[[0, 16, 8, 0]]",
    "no_width": "[[8, 0, 8, 16]]",
    "negative": "[[-1, 0, 8, 16]]",
    "right": "[[0, 0, 17, 16]]",
    "below": "[[0, 0, 8, 16.01]]",
    "far": "[[100, 100, 200, 200]]",
    "one_of_two": "[[0, 0, 8, 16], [8, 0, 0, 16]]",
    "nan": "[[NaN, 0, 8, 16]]",
    "infinite": "[[0, 0, Infinity, 16]]",
    "overflow": "[[0, 0, 1e999, 16]]",
    "2^31": f"[[0, 0, {2**31}, 16]]",
    "2^63": f"[[0, 0, {2**63}, 16]]",
    "10^400": f"[[0, 0, 1{'0' * 400}, 16]]",
    "5000_digits": f"[[0, 0, {'9' * 5000}, 16]]",
    "three": "[[0, 0, 8]]",
    "five": "[[0, 0, 8, 16, 1]]",
    "text": '[["0", 0, 8, 16]]',
    "null": "[[null, 0, 8, 16]]",
    "true": "[[true, 0, 8, 16]]",
    "nested": "[[[0, 0, 8, 16]]]",
    "flat": "[0, 0, 8, 16]",
    "object": '{"xmin": 0}',
}


def boxes_table() -> bytes:
    quoted = {name: boxes.replace('"', '""') for name, boxes in BOXES.items()}
    return ("path,id,boxes\n" + "".join(f'a.png,{name},"{boxes}"\n' for name, boxes in quoted.items())).encode()


TABLES["boxes.csv"] = boxes_table


# Weights


class _Runs:
    """Pickled, it makes the folder `it_ran` when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, ("it_ran",)


def torch_file(content: object, *, zipped: bool = True) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def tensors() -> dict[str, Any]:
    import torch

    return {"0.weight": torch.arange(6.0).reshape(2, 3)}


def safetensors(header: object, body: bytes = b"", claims: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if claims is None else claims) + text + body


def tensor_of(shape: list[int], end: int) -> dict[str, Any]:
    return {"0.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}


def no_directory() -> bytes:
    """The directory is said to lie behind the end of the file, in the record of 64 bits and in that of 32."""
    whole = bytearray(torch_file(tensors()))
    struct.pack_into("<Q", whole, whole.rindex(b"PK\x06\x06") + 48, 2**31)
    struct.pack_into("<I", whole, whole.rindex(b"PK\x05\x06") + 16, 2**31)
    return bytes(whole)


WEIGHTS: dict[str, Callable[[], bytes]] = {
    "good.pt": lambda: torch_file(tensors()),
    "good.safetensors": lambda: safetensors(tensor_of([2, 3], 24), np.arange(6, dtype=np.float32).tobytes()),
    "code.pkl.pt": lambda: pickle.dumps(_Runs()),
    "code.pt": lambda: torch_file({"0.weight": _Runs()}),
    "code_old_format.pt": lambda: torch_file({"0.weight": _Runs()}, zipped=False),
    "half.pt": lambda: torch_file(tensors())[:400],
    "half_old_format.pt": lambda: torch_file(tensors(), zipped=False)[:-30],
    "no_directory.pt": no_directory,
    "empty.pt": lambda: b"",
    "page.pt": lambda: b"<!DOCTYPE html><html><body>Not found</body></html>",
    "half.safetensors": lambda: safetensors(tensor_of([2, 3], 24), b"\0" * 8),
    "header_of_gigabytes.safetensors": lambda: safetensors(b"{}", claims=2**33),
    "header_of_exabytes.safetensors": lambda: safetensors(b"{}", claims=2**63),
    "header_no_json.safetensors": lambda: safetensors(b"not json"),
    "shape_overflow.safetensors": lambda: safetensors(tensor_of([2**40, 2**40], 4), b"\0" * 4),
    "shape_and_size.safetensors": lambda: safetensors(tensor_of([4, 4], 24), b"\0" * 24),
    "empty.safetensors": lambda: b"",
}


# Archives


def tar(members: list[tuple[str, bytes | bytearray]], **fields: Any) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def pair(name: str) -> list[tuple[str, bytes | bytearray]]:
    return [(f"{name}.png", encoded(picture(), "PNG")), (f"{name}.txt", b"a red square")]


def header(member: tarfile.TarInfo, size: bytes | None = None) -> bytes:
    """A header whose size field may say anything."""
    raw = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    if size is not None:
        raw[124:136] = size
        raw[148:156] = b" " * 8
        raw[148:156] = b"%06o\0 " % sum(raw)
    return bytes(raw)


def negative_size() -> bytes:
    """A second member whose end lies where it starts, in base 256: a reader that follows it never ends."""
    member = tarfile.TarInfo("loop.png")
    return tar(pair("a"))[:2048] + header(member, b"\xff" * 10 + b"\xfe\x00") + b"\0" * 1024


def named_over_and_over() -> bytes:
    """Long names of long names, each of which tarfile reads from within the one before; too large to be kept."""
    member = tarfile.TarInfo("././@LongLink")
    member.type, member.size = tarfile.GNUTYPE_LONGNAME, 5
    return (header(member) + b"abcd\0".ljust(512, b"\0")) * 1500 + tar(pair("a"))


def huge_header(kind: bytes) -> bytes:
    member = tarfile.TarInfo("x")
    member.type = kind
    return header(member, b"\x80\0\0\0" + struct.pack(">Q", 2**62)) + b"\0" * 512 + tar(pair("a"))


def others() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, content in pair("a"):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind, target in (
            ("passwd.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.txt", tarfile.LNKTYPE, "../../etc/passwd"),
            ("tty.png", tarfile.CHRTYPE, ""),
            ("disk.png", tarfile.BLKTYPE, ""),
            ("pipe.png", tarfile.FIFOTYPE, ""),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return stream.getvalue()


def flickr(*more: tuple[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    """The zip archive of a Flickr8k of two images."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("Images/a.jpg", encoded(picture(), "JPEG"))
        archive.writestr("Images/b.jpg", encoded(picture(GREEN), "JPEG"))
        archive.writestr("captions.txt", "image,caption\na.jpg,red\nb.jpg,green\n")
        for name, content in more:
            archive.writestr(name, content)
    return stream.getvalue()


def in_directory(whole: bytes, name: bytes, offset: int, value: bytes) -> bytes:
    """The archive with other bytes in the central directory's entry of a member."""
    changed = bytearray(whole)
    start = whole.index(b"PK\x01\x02")
    while whole[start + 46 : start + 46 + len(name)] != name:
        start = whole.index(b"PK\x01\x02", start + 4)
    changed[start + offset : start + offset + len(value)] = value
    return bytes(changed)


def claims_gigabytes() -> bytes:
    """A megabyte of which the directory says that it unpacks to 2^40 bytes; such a size stands in an extra field."""
    huge = in_directory(flickr(("Images/c.jpg", bytes(1 << 20))), b"Images/c.jpg", 24, b"\xff" * 4)
    whole = bytearray(in_directory(huge, b"Images/c.jpg", 30, struct.pack("<H", 12)))
    end = whole.index(b"PK\x05\x06")  # of the directory, whose last entry is this
    (length,) = struct.unpack_from("<I", whole, end + 12)
    struct.pack_into("<I", whole, end + 12, length + 12)
    return bytes(whole[:end] + struct.pack("<HHQ", 1, 8, 2**40) + whole[end:])


def damaged_member() -> bytes:
    whole = bytearray(flickr())
    whole[whole.index(b"b.jpg") + 40] ^= 0xFF
    return bytes(whole)


ARCHIVES: dict[str, Callable[[], bytes]] = {
    "good.tar": lambda: tar(pair("a")),
    "traversal.tar": lambda: tar([*pair("../../outside"), *pair("/etc/absolute"), *pair("a")]),
    "links_and_devices.tar": others,
    "twice.tar": lambda: tar([*pair("a"), ("a.txt", b"a second text")]),
    "negative_size.tar": negative_size,
    "huge_extended_header.tar": lambda: huge_header(tarfile.XHDTYPE),
    "huge_long_name.tar": lambda: huge_header(tarfile.GNUTYPE_LONGNAME),
    "sparse.tar": lambda: tar(pair("a"), pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}),
    "compressed.tar": lambda: zlib.compress(tar(pair("a"))),
    "cut_off.tar": lambda: tar(pair("a"))[:1200],
    "good.zip": flickr,
    "traversal.zip": lambda: flickr(("../../Images/c.jpg", b"x"), ("/Images/d.jpg", b"x"), ("Images/../e.jpg", b"x")),
    "twice.zip": lambda: flickr(("Images/b.jpg", encoded(picture(RED), "JPEG"))),
    "damaged_member.zip": damaged_member,
    "encrypted_member.zip": lambda: in_directory(flickr(), b"Images/b.jpg", 8, b"\1\0"),
    "unknown_compression.zip": lambda: in_directory(flickr(), b"Images/b.jpg", 10, b"\x63\0"),
    "claims_gigabytes.zip": claims_gigabytes,
    "unpacks_to_more.zip": lambda: in_directory(
        flickr(("Images/c.jpg", bytes(1 << 20))), b"Images/c.jpg", 24, b"\x10\0\0\0"
    ),
    "name_no_utf8.zip": lambda: in_directory(
        in_directory(flickr(("Images/c.jpg", b"x")), b"Images/c.jpg", 8, b"\0\x08"), b"Images/c.jpg", 53, b"\xff"
    ),
    "no_directory.zip": lambda: flickr()[:-30],
    "empty.zip": lambda: b"",
}


GROUPS = {"images": IMAGES, "xml": XML, "tables": TABLES, "weights": WEIGHTS, "archives": ARCHIVES}

if __name__ == "__main__":
    for group, files in GROUPS.items():
        for name, make in files.items():
            path = FOLDER / group / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                path.write_bytes(make())
