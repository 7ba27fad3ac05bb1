"""End-to-end measurements of serving as rows: read by header, repaired, named by what was run.

A row is one closed loop: so many clients against one deployment. Known defects of such collections are undone before anything is simulated, each by a rule
on input columns: degrees stored as products with the GPU count, batch sizes per GPU, zeros for unknown degrees. A row that cannot be expressed is kept with
its reason, it never stops the rest. Shapes: none. Tokens, milliseconds, GPUs.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path

from moesim.errors import InputError, describe
from moesim.files import read_bytes

SHIPPED = Path(__file__).parent / "points"
LIMIT = 256 * 2**20
MAX_ROWS = 200_000
MAX_TOKENS = 1 << 20
MAX_CLIENTS = 1 << 16
SUFFIX = ".csv.gz"
COPY = "copy of another row"
"""Reason why a row is not scored."""

_NAMES = {
    "model": ("model_path", "model"),
    "backend": ("backend", "engine"),
    "version": ("backend_version", "version"),
    "source": ("silicon_data_source", "source"),
    "mode": ("mode",),
    "prompt": ("isl", "input_len", "prompt_tokens", "input_length", "random_input_len"),
    "output": ("osl", "output_len", "output_tokens", "output_length", "random_output_len"),
    "clients": ("concurrency", "clients", "max_concurrency"),
    "weights": ("gemm_quant_mode", "weight_dtype", "quantization"),
    "ttft": ("silicon_ttft_ms", "ttft_ms", "mean_ttft_ms"),
    "tpot": ("silicon_tpot_ms", "tpot_ms", "mean_tpot_ms"),
}
"""What a row says → names of its column."""
_DEGREES = ("batch_size", "num_workers", "tp_size", "pp_size", "attention_dp_size", "moe_tp_size", "moe_ep_size")
_SPELT = {
    "tp_size": ("tensor_parallel_size", "tp"),
    "pp_size": ("pipeline_parallel_size", "pp"),
    "attention_dp_size": ("data_parallel_size", "dp_size", "dp"),
    "moe_tp_size": ("expert_tensor_parallel_size", "expert_tp", "moe_tp"),
    "moe_ep_size": ("expert_parallel_size", "ep_size", "ep", "moe_ep"),
}
"""Column of a degree → other names of it."""
_NEEDED = ("model", "prompt", "output")


@dataclass(frozen=True, slots=True, order=True)
class Layout:
    """The degrees of one worker, and how many workers there are."""

    tp: int
    dp: int
    pp: int
    moe_tp: int
    moe_ep: int
    workers: int | None = 1
    """None: the row does not say."""

    @property
    def gpus(self) -> int:
        """Devices of one worker."""
        return self.tp * self.dp * self.pp


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured closed loop."""

    id: str
    model: str
    backend: str
    version: str
    weights: str
    """Label of the weights' type; empty: as the checkpoint says."""
    prompt: int
    """Nominal prompt tokens; requests draw 0.8 to 1 of it."""
    output: int
    clients: int
    decode: Layout
    """The deployment, or the part of it that decodes."""
    prefill: Layout | None = None
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    repairs: tuple[str, ...] = ()
    filled: int = field(default=0, compare=False)
    """How many cells of the row hold something: of two copies the fuller one is kept."""

    @property
    def gpus(self) -> int:
        """Devices in all, one worker where the number is not known."""
        return sum(part.gpus * (part.workers or 1) for part in (self.decode, self.prefill) if part is not None)

    @property
    def inputs(self) -> tuple[object, ...]:
        """What a prediction can depend on; rows that share it differ by noise, or by what their columns do not tell."""
        return (self.model, self.backend, self.version, self.weights, self.prompt, self.output, self.clients, self.decode, self.prefill)

    @property
    def layout(self) -> tuple[object, ...]:
        """The degrees: what a planner chooses."""
        return (self.decode, self.prefill)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A row that is not scored, or a quantity of it."""

    id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """A file of measurements."""

    source: str
    rows: int
    points: tuple[Point, ...]
    refused: tuple[Refused, ...]
    ignored: tuple[str, ...]
    """Columns that say nothing to a prediction."""


def shipped_points() -> dict[str, Path]:
    """Return the files of the package by device name."""
    return {path.name.removesuffix(SUFFIX): path for path in sorted(SHIPPED.glob(f"*{SUFFIX}"))}


def read_points(path: Path) -> Points:
    """Read a CSV (or gzipped CSV) of end-to-end measurements. Raises InputError if the file or its header is not one of this kind."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        header = [name.strip() for name in next(reader, [])]
        columns = _columns(path, header)
        header = _degree_columns(path, header)
        points: list[Point] = []
        refused: list[Refused] = []
        count = 0
        for number, cells in enumerate(reader, start=2):
            if not cells:
                continue
            count += 1
            if count > MAX_ROWS:
                raise InputError(describe(str(path), "rows", f"> {MAX_ROWS}", f"must be <= {MAX_ROWS}", "split the file"))
            row = {name: cell.strip() for name, cell in zip(header, cells, strict=False)}
            name = row.get("id") or f"line {number}"
            try:
                points.append(_point(name, row, columns))
            except _Impossible as cause:
                refused.append(Refused(id=name, reason=cause.reason, detail=str(cause)))
    except csv.Error as cause:
        raise InputError(f"{path}: is not a CSV file ({cause}); give comma-separated rows under one header") from None
    known = {"id", "system", "precision", *columns.values(), *_degree_names()}
    return Points(source=str(path), rows=count, points=tuple(points), refused=tuple(refused), ignored=tuple(one for one in header if one not in known))


def _text(path: Path) -> str:
    data = read_bytes(path, limit=LIMIT)
    try:
        if data[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
                data = file.read(LIMIT + 1)
            if len(data) > LIMIT:
                raise InputError(describe(str(path), "size unpacked", f"> {LIMIT} B", f"must be <= {LIMIT} B"))
        return data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as cause:
        raise InputError(f"{path}: is neither UTF-8 text nor gzipped UTF-8 text ({cause}); give a CSV file") from None


def _columns(path: Path, header: list[str]) -> dict[str, str]:
    if len(set(header)) != len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: column {twice!r} appears twice; keep one of them")
    columns = {key: next(name for name in names if name in header) for key, names in _NAMES.items() if any(name in header for name in names)}
    missing = [_NAMES[key][0] for key in _NEEDED if key not in columns]
    if missing or not {"ttft", "tpot"} & set(columns):
        missing = missing or [f"{_NAMES['ttft'][0]} or {_NAMES['tpot'][0]}"]
        raise InputError(
            f"{path}: column {missing[0]} is missing; a file of end-to-end points has model_path, isl, osl, degrees, silicon_ttft_ms, silicon_tpot_ms"
        )
    return columns


def _degree_columns(path: Path, header: list[str]) -> list[str]:
    """Return the header with the degrees under their own names."""
    own = {other: name for name, others in _SPELT.items() for other in others}
    renamed = [own.get(name, name) for name in header]
    if len(set(renamed)) != len(renamed):
        twice = next(name for name in renamed if renamed.count(name) > 1)
        raise InputError(f"{path}: columns {' and '.join(one for one in header if own.get(one, one) == twice)} name one degree; keep one of them")
    return renamed


def _degree_names() -> list[str]:
    return [prefix + name for prefix in ("", "prefill_", "decode_") for name in _DEGREES]


class _Impossible(Exception):
    """A row that cannot be expressed."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _number(row: Mapping[str, str], name: str) -> float | None:
    """Return the number in a cell; None if the cell is empty."""
    text = row.get(name, "")
    if not text or text.lower() in ("nan", "none"):
        return None
    try:
        return float(text)
    except ValueError:
        raise _Impossible("a cell is no number", f"{name} = {text[:40]!r}") from None


def _whole(row: Mapping[str, str], name: str, low: int, high: int) -> int | None:
    """Return a whole number; None for an empty cell and for 0, which stands for "not known" in the degrees."""
    value = _number(row, name)
    if value is None or value == 0:
        return None
    if not isfinite(value) or value != int(value):
        raise _Impossible("a cell is no number", f"{name} = {row[name][:40]!r} must be a whole number")
    if not low <= value <= high:
        raise _Impossible("a value is impossible", f"{name} = {row[name][:40]} must be in {low}..{high}")
    return int(value)


def _time(row: Mapping[str, str], name: str | None) -> float | None:
    value = _number(row, name) if name else None
    if name and value is not None and (not isfinite(value) or value <= 0):
        raise _Impossible("a value is impossible", f"{name} = {row[name][:40]} must be > 0 ms")
    return value


def _point(name: str, row: Mapping[str, str], columns: Mapping[str, str]) -> Point:
    def text(key: str) -> str:
        return row.get(columns[key], "") if key in columns else ""

    model = text("model")
    if not model:
        raise _Impossible("a value is missing", f"{columns['model']} is empty")
    prompt, output = (_whole(row, columns[key], 1, MAX_TOKENS) for key in ("prompt", "output"))
    if prompt is None or output is None:
        raise _Impossible("a value is missing", "prompt and output lengths are needed")
    ttft, tpot = _time(row, columns.get("ttft")), _time(row, columns.get("tpot"))
    if output == 1:
        tpot = None  # no token follows the first
    if ttft is None and tpot is None:
        raise _Impossible("no measured times", "neither TTFT nor TPOT of more than one token")
    split = text("mode") == "disagg" or (not row.get("tp_size") and bool(row.get("decode_tp_size")))
    prefix = "decode_" if split else ""
    batch = _whole(row, f"{prefix}batch_size", 1, MAX_CLIENTS)
    decode = _layout(row, prefix, split)
    prefill = _layout(row, "prefill_", True) if split else None
    clients = _clients(name, row, columns)
    repairs: list[str] = []
    if clients is None and re.search(r"_c(?:_|$)", name):
        # Where clients are named elsewhere in such a collection, batch sizes follow from them; here a batch size may as well be a limit of the server.
        raise _Impossible("clients not stated", "the id has a place for the client concurrency and leaves it empty; name it in a column")
    if clients is None and batch is not None:
        clients = batch * decode.dp * (decode.workers or 1)
        repairs.append("clients from batch per replica")
    if clients is None:
        raise _Impossible("a value is missing", "client concurrency: neither in the id, nor a column, nor a batch size")
    if re.match(r"\d{4}_\d{2}_\d{2}_", name) or re.search(r"_cfg\d+$", name):
        fixed = unfold(decode)
        if fixed != decode:
            decode = fixed
            repairs.append("degrees stored as products")
        if prefill is not None and unfold(prefill) != prefill:
            prefill = unfold(prefill)
            repairs.append("prefill degrees stored as products")
    elif not split and not row.get("attention_dp_size") and batch is not None and batch != clients and batch * decode.tp == clients:
        # The batch is that of a replica: as many replicas as GPUs.
        decode = replace(decode, tp=1, dp=decode.tp)
        repairs.append("attention DP from clients and batch")
    return Point(
        id=name,
        model=model,
        backend=text("backend").lower(),
        version=text("version"),
        weights=text("weights").lower(),
        prompt=prompt,
        output=output,
        clients=clients,
        decode=decode,
        prefill=prefill,
        ttft_ms=ttft,
        tpot_ms=tpot,
        repairs=tuple(repairs),
        filled=sum(bool(cell) for cell in row.values()),
    )


def _layout(row: Mapping[str, str], prefix: str, split: bool) -> Layout:
    values = {one: _whole(row, f"{prefix}{one}_size", 1, 65536) for one in ("tp", "pp", "attention_dp", "moe_tp", "moe_ep")}
    if values["tp"] is None:
        raise _Impossible("a value is missing", f"{prefix}tp_size is empty")
    tp, dp, pp = values["tp"], values["attention_dp"] or 1, values["pp"] or 1
    ep = values["moe_ep"] or (tp * dp // values["moe_tp"] if values["moe_tp"] else 1)
    workers = _whole(row, f"{prefix}num_workers", 1, 65536) if split else 1
    return Layout(tp, dp, pp, values["moe_tp"] or max(tp * dp // ep, 1), ep, workers)


def unfold(layout: Layout) -> Layout:
    """Return the degrees where tp × ep was stored as the GPU count: as many GPUs as the larger of the tensor degrees says."""
    T, E = (layout.moe_tp if layout.moe_tp > 1 else layout.tp), layout.moe_ep
    if not (E > 1 and (layout.moe_tp > 1 or (layout.tp > 1 and layout.dp > 1))):
        return layout
    E = min(E // layout.dp if E > T and E % layout.dp == 0 else E, T)
    shards = max(T // E, 1)
    return replace(layout, tp=1, dp=T, moe_tp=shards, moe_ep=E) if layout.tp == 1 and layout.dp > 1 else replace(layout, tp=T, dp=1, moe_tp=shards, moe_ep=E)


def _clients(name: str, row: Mapping[str, str], columns: Mapping[str, str]) -> int | None:
    if "clients" in columns and row.get(columns["clients"]):
        return _whole(row, columns["clients"], 1, MAX_CLIENTS)
    found = re.search(r"_c(\d{1,6})(?:_|$)", name) or re.search(r"concurrency=(\d{1,6})\b", row.get(columns.get("source", ""), ""))
    return int(found.group(1)) if found and 1 <= int(found.group(1)) <= MAX_CLIENTS else None
