"""V2 bodies: what is understood, what is refused and with which status."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from rayloop.serve.client import infer_body, read_answer
from rayloop.serve.protocol.answer import infer_answer
from rayloop.serve.protocol.error import ProtocolError
from rayloop.serve.protocol.infer import parse_infer
from rayloop.serve.protocol.request import OutputWish
from rayloop.serve.protocol.spec import ModelSpec, model_document, server_document

SPEC = ModelSpec(model="m", version="3", shape=(2, 3, 1), class_names=("a", "b"))
IMAGE = {"name": "image", "shape": [1, 2, 3, 1], "datatype": "UINT8", "data": [0, 1, 2, 3, 4, 255]}


def parse(document: object, header: str | None = None, max_rows: int = 8):
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_infer(body, header, SPEC, max_rows)


def image(**changes: object) -> dict:
    merged = {**IMAGE, **changes}
    return {"inputs": [{k: v for k, v in merged.items() if v is not None}]}


def status_of(document: object, header: str | None = None) -> int:
    with pytest.raises(ProtocolError) as caught:
        parse(document, header)
    assert json.loads(caught.value.body())["error"]
    return caught.value.status


def test_flat_and_nested_json_are_the_same_tensor() -> None:
    nested = [[[[0], [1], [2]], [[3], [4], [255]]]]
    expected = np.array(nested, np.uint8)
    for data in (IMAGE["data"], nested):
        request = parse({"id": "x", **image(data=data)})
        np.testing.assert_array_equal(request.images, expected)
        assert request.images.dtype == np.uint8
        assert (request.request_id, request.output.binary) == ("x", False)


@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 8), st.just(2), st.just(3), st.just(1))))
def test_binary_and_json_requests_carry_every_image(images: np.ndarray) -> None:
    body, head = infer_body(images)
    binary = parse(body, str(head))
    np.testing.assert_array_equal(binary.images, images)
    assert binary.output.binary
    as_json = parse(image(shape=list(images.shape), data=images.ravel().tolist()))
    np.testing.assert_array_equal(as_json.images, images)


def test_a_raw_request_is_one_image_and_a_binary_answer() -> None:
    request = parse(bytes(range(6)), "0")
    np.testing.assert_array_equal(request.images.ravel(), range(6))
    assert request.output.binary
    assert status_of(b"12345", "0") == 400


@pytest.mark.parametrize(
    ("document", "status"),
    [
        (b"", 400),
        (b"not json", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b'{"inputs": NaN}', 400),
        ([], 400),
        ({}, 400),
        ({"inputs": {}}, 400),
        ({"inputs": [IMAGE, IMAGE]}, 400),
        ({"inputs": ["image"]}, 400),
        ({"id": 7, **image()}, 400),
        (image(name="picture"), 400),
        (image(datatype=None), 400),
        (image(datatype="UINT9"), 400),
        (image(datatype=["UINT8"]), 400),
        (image(datatype="FP32"), 422),
        (image(shape=None), 400),
        (image(shape=[1, 2, 3, True]), 400),
        (image(shape=[1, 2, 3, -1]), 400),
        (image(shape=[1, 2, 3, 1.0]), 400),
        (image(shape=[1, 3, 2, 1]), 422),
        (image(shape=[2, 3, 1]), 422),
        (image(shape=[]), 422),
        (image(shape=[0, 2, 3, 1], data=[]), 422),
        (image(shape=[9, 2, 3, 1], data=[0] * 54), 413),
        (image(data=None), 400),
        (image(data="aGk="), 400),
        (image(data=[0, 1, 2]), 400),
        (image(data=[[0, 1, 2], [3, 4, 5]]), 400),
        (image(data=[[0, 1, 2], [3, 4]]), 400),
        (image(data=[0, 1, 2, 3, 4, 256]), 400),
        (image(data=[0, 1, 2, 3, 4, -1]), 400),
        (image(data=[0, 1, 2, 3, 4, 10**30]), 400),
        (image(data=[0, 1, 2, 3, 4, 0.5]), 400),
        (image(data=[0, 1, 2, 3, 4, None]), 400),
        (image(data=[0, 1, 2, 3, 4, "5"]), 400),
        (image(data=[True] * 6), 400),
        (image(parameters=[]), 400),
        (image(parameters={"shared_memory_region": "r"}), 400),
        ({**image(), "outputs": [{"name": "logits"}]}, 400),
        ({**image(), "outputs": "probabilities"}, 400),
        (
            {**image(), "outputs": [{"name": "probabilities", "parameters": {"binary_data": 1}}]},
            400,
        ),
        (
            {
                **image(),
                "outputs": [{"name": "probabilities", "parameters": {"classification": -1}}],
            },
            400,
        ),
        ({**image(), "parameters": {"binary_data_output": "yes"}}, 400),
    ],
)
def test_what_is_refused(document: object, status: int) -> None:
    assert status_of(document) == status


@pytest.mark.parametrize("header", ["-1", "abc", "1e3", "99999", "9" * 40, "²", ""])
def test_a_wrong_json_length_is_malformed(header: str) -> None:
    assert status_of(image(), header) == 400


@pytest.mark.parametrize("size", [5, 7, "6", True, None, 10**18])
def test_a_wrong_tensor_size_is_malformed(size: object) -> None:
    head = json.dumps(image(data=None, parameters={"binary_data_size": size})).encode()
    assert status_of(head + bytes(6), str(len(head))) == 400


@pytest.mark.parametrize("tail", [b"", b"12345", b"1234567"])
def test_missing_or_surplus_tensor_bytes_are_malformed(tail: bytes) -> None:
    head = json.dumps(image(data=None, parameters={"binary_data_size": 6})).encode()
    assert status_of(head + tail, str(len(head))) == 400
    surplus = json.dumps(image()).encode()
    if tail:
        assert status_of(surplus + tail, str(len(surplus))) == 400


@settings(max_examples=150)
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(
                    ["inputs", "outputs", "name", "shape", "datatype", "data", "parameters", "id"]
                ),
                inner,
                max_size=5,
            )
        ),
        max_leaves=20,
    ),
    header=st.none() | st.text(max_size=4) | st.integers(0, 200).map(str),
)
def test_no_document_breaks_the_parser(document: object, header: str | None) -> None:
    try:
        request = parse(json.dumps(document).encode(), header)
    except ProtocolError as error:
        assert error.status in (400, 413, 422)
    else:
        assert request.images.shape[1:] == SPEC.shape


@settings(max_examples=150)
@given(
    field=st.sampled_from(["name", "shape", "datatype", "data", "parameters"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=6),
        max_leaves=12,
    ),
)
def test_no_value_of_a_field_breaks_the_parser(field: str, value: object) -> None:
    try:
        request = parse(json.dumps({"inputs": [{**IMAGE, field: value}]}).encode())
    except ProtocolError as error:
        assert error.status in (400, 413, 422)
    else:
        assert request.images.shape[1:] == SPEC.shape


@given(hnp.arrays(np.float32, (3, 2), elements=st.floats(0, 1, width=32)))
def test_answers_carry_every_bit(probabilities: np.ndarray) -> None:
    body, head = infer_answer(probabilities, SPEC, "id-1", OutputWish(True))
    assert head is not None
    np.testing.assert_array_equal(read_answer(body, head), probabilities)
    text, no_head = infer_answer(probabilities, SPEC, "id-1", OutputWish())
    assert no_head is None
    document = json.loads(text)
    assert (document["model_name"], document["model_version"], document["id"]) == ("m", "3", "id-1")
    output = document["outputs"][0]
    assert (output["shape"], output["datatype"]) == ([3, 2], "FP32")
    np.testing.assert_array_equal(np.float32(output["data"]).reshape(3, 2), probabilities)


def test_an_answer_repeats_no_id_that_was_not_given() -> None:
    body, _ = infer_answer(np.zeros((1, 2), np.float32), SPEC, None, OutputWish())
    assert "id" not in json.loads(body)


def test_documents_describe_the_signature() -> None:
    assert "binary_tensor_data" in server_document("1")["extensions"]
    document = model_document(SPEC, ["3"])
    assert document["versions"] == ["3"]
    assert document["inputs"] == [{"name": "image", "datatype": "UINT8", "shape": [-1, 2, 3, 1]}]
    assert document["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 2]}]
