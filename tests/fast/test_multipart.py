"""Forms with files: read at any split, every part bounded."""

import pytest

from tokenmill.server.multipart import FormReader, PartBegin, boundary_of
from tokenmill.wire import FieldError

CONTENT = b"line\r\n--limi\r\n--limits\n\x00\xff\r\n"
FORM = (
    b'--limit\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    b'--limit\r\ncontent-disposition: form-data; name="file"; filename="a \\"b\\".jsonl"\r\n'
    b"Content-Type: application/jsonl\r\n\r\n"
    + CONTENT.replace(b"--limits", b"-limits")
    + b"\r\n--limit--\r\nmore"
)


def _read(pieces: list[bytes]) -> list[tuple[PartBegin, bytes]]:
    reader = FormReader(b"limit")
    parts: list[tuple[PartBegin, bytes]] = []
    for piece in pieces:
        for event in reader.feed(piece):
            if isinstance(event, PartBegin):
                parts.append((event, b""))
            else:
                parts[-1] = (parts[-1][0], parts[-1][1] + event)
    reader.finish()
    return parts


def test_a_form_is_the_same_at_every_split() -> None:
    expected = [
        (PartBegin("purpose", None), b"batch"),
        (PartBegin("file", 'a "b".jsonl'), CONTENT.replace(b"--limits", b"-limits")),
    ]
    assert _read([FORM]) == expected
    for at in range(len(FORM)):
        assert _read([FORM[:at], FORM[at:]]) == expected
    assert _read([FORM[at : at + 1] for at in range(len(FORM))]) == expected


def test_an_empty_file_and_an_empty_field_are_parts() -> None:
    head = b'--limit\r\nContent-Disposition: form-data; name="a"\r\n\r\n'
    assert _read([head + b"\r\n--limit--"]) == [(PartBegin("a", None), b"")]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        FORM[:-10],
        FORM[: FORM.index(b"--limit--")],
        b"x" * 5000,
        b"--limitless\r\n\r\n",
        b"--limit\r\n\r\nno name\r\n--limit--",
        b"--limit\r\n" + b"x: y\r\n" * 2000 + b"\r\n",
        b'--limit\r\nContent-Disposition: attachment; name="a"\r\n\r\nx\r\n--limit--',
        b'--limit\r\nContent-Disposition: form-data; name="a"\r\n'
        b"Content-Transfer-Encoding: base64\r\n\r\nx\r\n--limit--",
        (b'--limit\r\nContent-Disposition: form-data; name="a"\r\n\r\nx\r\n') * 17 + b"--limit--",
    ],
)
def test_what_is_no_form_is_refused(body: bytes) -> None:
    for size in (1, 7, 1 << 16):
        with pytest.raises(FieldError):
            _read([body[at : at + size] for at in range(0, len(body), size)])


def test_nothing_is_held_but_what_could_be_a_boundary() -> None:
    reader = FormReader(b"limit")
    head = b'--limit\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    assert list(reader.feed(head)) == [PartBegin("file", "x")]
    for _ in range(100):
        passed = sum(len(event) for event in reader.feed(b"\r" * 1000) if isinstance(event, bytes))
        assert passed >= 1000 - len(b"\r\n--limit")


@pytest.mark.parametrize(
    "kind",
    [
        "",
        "application/json",
        "multipart/form-data",
        "multipart/mixed; boundary=x",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 71}",
        'multipart/form-data; boundary="a\r\nb"',
        'multipart/form-data; boundary="a "',
    ],
)
def test_wrong_content_types_are_refused(kind: str) -> None:
    with pytest.raises(FieldError):
        boundary_of(kind)


def test_boundaries_are_read_quoted_and_plain() -> None:
    assert boundary_of('multipart/form-data; charset=utf-8; boundary="a b:c"') == b"a b:c"
    assert boundary_of("Multipart/Form-Data;boundary=----x1") == b"----x1"
