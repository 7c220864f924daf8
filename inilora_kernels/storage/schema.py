"""The JSON that is read from files, with one strict schema for each kind: types, ranges and lengths are checked.

It comes from disks, hubs and other programs. pydantic's own parser reads it, so that deep nesting and huge numbers also
end in one of our errors.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import FactorFileError, InitializationError

# Scalings beyond these leave float32's range when A and B are divided by their square root.
LEAST_SCALING, MOST_SCALING = 1e-12, 1e12

_MOST = 2**53  # above this, JSON's numbers are no longer exact integers
# Sums of squares of float32's numbers, and their roots, stay far below; what follows computes with them.
_MOST_SQUARES = 1e200


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern!r} is not a valid regular expression ({error})") from error
    return pattern


Count = Annotated[int, Field(ge=0, le=_MOST)]
Rank = Annotated[int, Field(ge=1, le=_MOST)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Alpha = Annotated[float, Field(ge=LEAST_SCALING, le=MOST_SCALING)]
Expression = Annotated[str, AfterValidator(_expression)]
AnyModel = TypeVar("AnyModel", bound=BaseModel)


class ModuleRecord(BaseModel):
    """What a factor file records of one matrix; see Factors and Certificate.

    loss, optimum and energy are NaN only if it is unknown which weights the factors were computed from.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    loss: float
    optimum: float
    energy: float
    steps: Count
    # Files of version 0.1.0 lack it.
    certified: bool = True
    source_sha256: Sha256 | Literal[""]
    rows: tuple[Count, Count] | tuple[Count, Count, Count] | None
    transposed: bool
    dequantization: str = ""
    history: list[tuple[Count, Finite]]
    checkpoint_steps: list[Count]
    sha256: dict[str, Sha256] = {}
    singular_values: list[Annotated[float, Field(ge=0, le=math.sqrt(_MOST_SQUARES))]] = []

    @model_validator(mode="after")
    def _consistent(self) -> ModuleRecord:
        numbers = (self.loss, self.optimum, self.energy)
        if not all(0 <= number <= _MOST_SQUARES for number in numbers) and (
            self.source_sha256 or not all(math.isnan(number) for number in numbers)
        ):
            raise ValueError(f"loss, optimum and energy must be from 0 to {_MOST_SQUARES:g}")
        if self.rows is not None and not (self.rows[0] < self.rows[1] <= self.rows[-1]):
            raise ValueError(f"rows {self.rows} are not a range of rows")
        if not set(self.checkpoint_steps) <= {step for step, _ in self.history}:
            raise ValueError("a step of checkpoint_steps has no loss in history")
        return self


class FormatVersion(BaseModel):
    """The part of a factor file's metadata that every version has."""

    model_config = ConfigDict(strict=True, frozen=True)

    format_version: int


class FactorFileHeader(BaseModel):
    """A factor file's one metadata entry."""

    model_config = ConfigDict(strict=True, frozen=True)

    checksum: Sha256 | None = None
    options: dict[str, Any]
    modules: Annotated[dict[str, ModuleRecord], Field(min_length=1)]


class AdapterConfig(BaseModel):
    """The part of PEFT's adapter_config.json that decides what A and B stand for; the rest is kept unchanged."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    peft_type: str
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[Expression, Rank] | None = None
    alpha_pattern: dict[Expression, Alpha] | None = None
    use_rslora: bool | None = None
    use_dora: bool | None = None
    fan_in_fan_out: bool | None = None
    bias: str | None = None
    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None


class ResidualRecord(BaseModel):
    """inilora_residual.json: which model and which factors a residual folder was computed from.

    residual_sha256: of R in place of each target, by the tensor's name; missing in files of version 0.1.0.
    adapter_sha256: of the file of A and B as they start; missing in files of version 0.1.0.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    base: Annotated[str, Field(min_length=1)]
    source_sha256: dict[str, Sha256]
    factors_sha256: Sha256
    residual_sha256: dict[str, Sha256] = {}
    adapter_sha256: Sha256 | None = None


class ModelConfig(BaseModel):
    """The part of a model's config.json that this library reads itself; transformers reads the rest."""

    model_config = ConfigDict(strict=True, frozen=True)

    model_type: str | None = None
    architectures: list[str] | None = None
    quantization_config: dict[str, Any] | None = None


def parse(
    schema: type[AnyModel], content: str | bytes, where: str, refusal: type[InitializationError] = FactorFileError
) -> AnyModel:
    """`content`, JSON in UTF-8, parsed by a schema. Raises `refusal`, naming the first field that is wrong."""
    try:
        return schema.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"]) + ": " * bool(first["loc"])
        found = "" if first["type"] in ("missing", "json_invalid") else f", found {_short(first['input'])}"
        raise refusal(
            f"{where}: damaged, or of another format: {place}{first['msg']}{found}; write it again"
        ) from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
