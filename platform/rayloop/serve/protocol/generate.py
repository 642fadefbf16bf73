"""Turn `inference.proto` into the Python module beside it.

    python -m rayloop.serve.protocol.generate

protoc registers what it generates in one pool a process, where a second copy of package `inference`
(a client's, in the same process) is refused. So the module gets a pool of its own.
"""

import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
PROTO = "rayloop/serve/protocol/inference.proto"
MADE = "inference_pb2.py"


def generated() -> str:
    """The text of the generated module.

    Raises:
        RuntimeError: protoc refuses the definition, or generates what is not understood here.
    """
    from grpc_tools import protoc  # noqa: PLC0415  a tool of development only

    root = FOLDER.parents[2]
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"-I{root}", f"--python_out={folder}", PROTO]
        if protoc.main(["protoc", *flags]) != 0:
            raise RuntimeError(f"protoc refuses {root / PROTO}; its message is above.")
        text = Path(folder, PROTO).with_name(MADE).read_text()
    shared = "_descriptor_pool.Default()"
    if text.count(shared) != 1:
        raise RuntimeError("protoc names the pool in another way than before; adapt this module.")
    return "# mypy: ignore-errors\n" + text.replace(shared, "_descriptor_pool.DescriptorPool()")


if __name__ == "__main__":
    (FOLDER / MADE).write_text(generated())
