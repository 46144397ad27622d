"""What an ONNX file is to look like."""

from __future__ import annotations

from dataclasses import dataclass

from fxquant.errors import InputError, nearest

__all__ = ["CONSUMERS", "FORMS", "WEIGHTS", "OnnxOptions"]

FORMS = ("qdq", "qoperator")
CONSUMERS = ("onnxruntime", "openvino")
WEIGHTS = ("int8", "uint8")


@dataclass(frozen=True)
class OnnxOptions:
    """The form of the nodes, whether every integer must be the reference's, and who reads them.

    `weights` is the type that they are stored in: uint8 has a zero point of 128, the same values.

    Raises InputError for what does not go together.
    """

    form: str = "qdq"
    exact: bool = False
    consumer: str = "onnxruntime"
    weights: str = "int8"

    def __post_init__(self) -> None:
        for what, found, known in (
            ("form", self.form, FORMS),
            ("consumer", self.consumer, CONSUMERS),
            ("type of weights", self.weights, WEIGHTS),
        ):
            if found not in known:
                raise InputError(
                    f"there is no ONNX {what} {found!r}, there are {', '.join(known)}"
                    f"{nearest(found, known)}"
                )
        if self.consumer != "openvino":
            return
        if self.form == "qoperator":
            raise InputError(
                "OpenVINO applies the scales of a per-channel QLinearConv along the wrong axis, "
                "without a word; write form='qdq' for it"
            )
        if self.exact:
            raise InputError(
                "OpenVINO rounds half to even after adding the zero point, which is another "
                "integer at ties: no form is exact there; leave exact=False"
            )

    @property
    def operators(self) -> bool:
        """Whether layers are operators on codes, not float operators between Q and DQ."""
        return self.form == "qoperator"
