"""Turn what is served into an OpenAPI 3.1 document of the REST interface."""

from typing import Any

from rayloop import __version__
from rayloop.serve.protocol.spec import INPUT_NAME, OUTPUT_NAME, ModelSpec

Document = dict[str, Any]

OBJECT: Document = {"type": "object"}
TEXT: Document = {"type": "string"}
WHOLE: Document = {"type": "integer", "minimum": 0}
BINARY: Document = {"type": "string", "format": "binary"}

ERRORS = {
    400: "The request is malformed.",
    403: "Clients may not load or unload here.",
    404: "There is no such path, model, version or variant.",
    405: "The path takes another method.",
    409: "The prediction has another label already.",
    413: "The body, once inflated too, or its rows are too many.",
    415: "The encoding or the image format is not supported.",
    422: "The request is well-formed, and the model does not take it.",
    429: "The queue is full; try again after Retry-After.",
    500: "The model failed on this input, or the server met an error of its own.",
    501: "No predictions are remembered here.",
    503: "The model is not ready; try again after Retry-After.",
    504: "The deadline passed before the answer was there.",
}
LATER = {429, 503}
ABOUT_MODEL = (404, 405, 500, 503)
WITH_BODY = (400, 404, 405, 413, 415, 422, 429, 500, 503, 504)


def openapi_document(spec: ModelSpec) -> Document:
    """The document for one model."""
    paths: Document = {
        "/v2": {"get": _get("Name, version and extensions of the server", "Server")},
        "/v2/health/live": {"get": _get("The process answers", "Live")},
        "/v2/health/ready": {"get": _get("Inference requests are answered", "Ready", 503)},
        "/v2/models/stats": {"get": _get("Statistics of every version", "Statistics")},
        "/v2/repository/index": {
            "post": _post("Versions and their states", "IndexRequest", "Index")
        },
        "/predict": {"post": _predict()},
        "/feedback": {
            "post": _post("Tell the truth about a prediction", "Feedback", "Learned", 409, 501)
        },
        "/metrics": {"get": _metrics()},
        "/rayloop/status": {"get": _get("What every replica says of itself", "Status")},
        "/openapi.json": {"get": _get("This document", "Document")},
    }
    for verb in ("load", "unload"):
        operation = _post(f"Have a version {verb}ed", "RepositoryRequest", "Document", 403)
        operation["parameters"] = [_in_path("model")]
        paths[f"/v2/repository/models/{{model}}/{verb}"] = {"post": operation}
    for prefix, names in (
        ("/v2/models/{model}", ("model",)),
        ("/v2/models/{model}/versions/{version}", ("model", "version")),
    ):
        for path, operations in _model_paths().items():
            for operation in operations.values():
                operation["parameters"] = [_in_path(name) for name in names] + operation.pop(
                    "headers", []
                )
            paths[prefix + path] = operations
    return {
        "openapi": "3.1.0",
        "info": {"title": f"rayloop: {spec.model}", "version": __version__},
        "paths": paths,
        "components": {"schemas": _schemas(spec)},
    }


def _model_paths() -> Document:
    return {
        "": {"get": _get("Inputs and outputs of the model", "Model", *ABOUT_MODEL)},
        "/ready": {"get": _get("The model answers", "Ready", *ABOUT_MODEL)},
        "/config": {"get": _get("How the model is served", "ModelConfig", *ABOUT_MODEL)},
        "/stats": {"get": _get("Counts and times", "Statistics", *ABOUT_MODEL)},
        "/infer": {"post": _infer()},
    }


def _infer() -> Document:
    operation = _post("Infer", "InferRequest", "InferResponse")
    for content in (operation["requestBody"], operation["responses"]["200"]):
        content["content"]["application/octet-stream"] = {"schema": BINARY}
    operation["headers"] = [
        _header("Inference-Header-Content-Length", WHOLE, "Bytes of JSON before the tensors."),
        *_request_headers(),
    ]
    return operation


def _predict() -> Document:
    operation = _post("Classify one image file", "PredictForm", "Prediction")
    file = {"schema": BINARY}
    operation["requestBody"]["content"] = {
        **{f"image/{kind}": file for kind in ("png", "jpeg", "webp")},
        "multipart/form-data": {"schema": _ref("PredictForm")},
    }
    operation["parameters"] = _request_headers()
    return operation


def _metrics() -> Document:
    operation = _get("Metrics of every replica, for Prometheus", "Document")
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": TEXT}}
    return operation


def _request_headers() -> list[Document]:
    number: Document = {"type": "number", "exclusiveMinimum": 0}
    return [
        _header("x-request-timeout-ms", number, "Deadline in milliseconds."),
        _header("x-rayloop-unit", TEXT, "Who the request is for; assignment sticks to it."),
        _header("x-rayloop-variant", TEXT, "Variant that has to answer."),
    ]


def _schemas(spec: ModelSpec) -> Document:
    count: Document = _object(count=WHOLE, ns=WHOLE)
    parameters: Document = {
        "type": "object",
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }
    shape: Document = {"type": "array", "items": WHOLE}
    tensor = _object(name=TEXT, datatype=TEXT, shape=shape, parameters=parameters, data={})
    described = _object(
        name=TEXT, datatype=TEXT, shape={"type": "array", "items": {"type": "integer"}}
    )
    height, width, channels = spec.shape
    image = {
        **tensor,
        "required": ["name", "datatype", "shape"],
        "description": f"UINT8 [N, {height}, {width}, {channels}], or BYTES [N] of image files.",
    }
    image["properties"] = {**tensor["properties"], "name": {"const": INPUT_NAME}}
    output = _object(name={"const": OUTPUT_NAME}, parameters=parameters)
    statistics = _object(name=TEXT, version=TEXT, inference_count=WHOLE, execution_count=WHOLE)
    statistics["properties"]["inference_stats"] = _object(success=count, fail=count, queue=count)
    return {
        "Error": {**_object(error=TEXT), "required": ["error"]},
        "Document": OBJECT,
        "Server": _object(name=TEXT, version=TEXT, extensions=_list(TEXT)),
        "Live": _object(live={"type": "boolean"}),
        "Ready": _object(ready={"type": "boolean"}),
        "Model": _object(
            name=TEXT,
            versions=_list(TEXT),
            platform=TEXT,
            inputs=_list(described),
            outputs=_list(described),
        ),
        "ModelConfig": OBJECT,
        "Statistics": _object(model_stats=_list(statistics)),
        "IndexRequest": _object(ready={"type": "boolean"}),
        "Index": _list(_object(name=TEXT, version=TEXT, state=TEXT, reason=TEXT)),
        "RepositoryRequest": _object(parameters=OBJECT),
        "Feedback": {
            **_object(
                prediction_id=TEXT, row=WHOLE, label={"type": ["string", "integer"]}, source=TEXT
            ),
            "required": ["prediction_id", "label"],
        },
        "Learned": _object(
            prediction_id=TEXT, row=WHOLE, label=TEXT, known_before={"type": "boolean"}
        ),
        "Status": _object(replicas=_list(OBJECT)),
        "InferRequest": {
            **_object(
                id=TEXT, parameters=parameters, inputs=_list(image, 1), outputs=_list(output, 1)
            ),
            "required": ["inputs"],
        },
        "InferResponse": _object(
            model_name=TEXT,
            model_version=TEXT,
            id=TEXT,
            parameters=parameters,
            outputs=_list(tensor, 1),
        ),
        "PredictForm": {**_object(file=BINARY), "required": ["file"]},
        "Prediction": _object(
            prediction_id=TEXT,
            model=TEXT,
            version=TEXT,
            variant=TEXT,
            label={"enum": list(spec.class_names)},
            class_index=WHOLE,
            confidence={"type": "number", "minimum": 0, "maximum": 1},
            probabilities=_list({"type": "number"}),
            decision={"enum": ["accept", "fallback", "review"]},
        ),
    }


def _get(summary: str, schema: str, *statuses: int) -> Document:
    return {"summary": summary, "responses": _responses(schema, {405, 500, *statuses})}


def _post(summary: str, request: str, response: str, *statuses: int) -> Document:
    return {
        "summary": summary,
        "requestBody": {"content": {"application/json": {"schema": _ref(request)}}},
        "responses": _responses(response, {*WITH_BODY, *statuses}),
    }


def _responses(schema: str, statuses: set[int]) -> Document:
    found: Document = {"200": {"description": "Done.", "content": _json(schema)}}
    for status in sorted(statuses):
        entry: Document = {"description": ERRORS[status], "content": _json("Error")}
        if status in LATER:
            entry["headers"] = {"Retry-After": {"schema": WHOLE}}
        found[str(status)] = entry
    return found


def _json(schema: str) -> Document:
    return {"application/json": {"schema": _ref(schema)}}


def _ref(name: str) -> Document:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: Document) -> Document:
    return {"type": "object", "properties": properties}


def _list(items: Document, most: int = 0) -> Document:
    return {"type": "array", "items": items, **({"maxItems": most} if most else {})}


def _in_path(name: str) -> Document:
    return {"name": name, "in": "path", "required": True, "schema": TEXT}


def _header(name: str, schema: Document, text: str) -> Document:
    return {"name": name, "in": "header", "schema": schema, "description": text}
