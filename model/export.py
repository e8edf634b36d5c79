"""A saved model as one file that needs nothing of this project, checked against the network on real images."""

import importlib.util
import io
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from data.errors import DataError, RunError, UserError, first_line
from data.files import whole_file
from data.images import IMAGE_SIZE
from data.split import DIVISION_SEED, load_split
from model.quality import as_predictor, logits_of
from model.saved import SavedModel

ExportFormat = Literal["onnx", "torch-export"]
SUFFIXES: dict[ExportFormat, str] = {"onnx": ".onnx", "torch-export": ".pt2"}
CLASSES = "classes.json"
"""Both formats store the names of the classes under this name, as a list in JSON."""

CHECKED_IMAGES = 256
TOLERANCE = 1e-4
"""By how much a logit may differ, as a share of the largest logit (or of 1, if that is larger).

Measured on a network after three epochs on CIFAR-10, on an EPYC core: both formats 4e-7, weights rounded to half
precision 6e-4, passes in bfloat16 7e-3.
"""

MOST_ONNX_BYTES = 2_000_000_000
"""An ONNX file with its weights inside is one protobuf message, which is limited to 2 GiB."""

NEEDED_FOR_ONNX = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Agreement:
    """How far an exported file and its network differ on real images.

    Attributes:
        images: their number.
        source: what they are.
        difference: largest absolute difference of a logit.
        allowed: the largest that passes.
        same_class: number of images for which both predict the same class.
    """

    images: int
    source: str
    difference: float
    allowed: float
    same_class: int

    @property
    def passes(self) -> bool:
        """Whether the file computes the network; a difference that is not a number does not pass."""
        return self.difference <= self.allowed

    def __str__(self) -> str:
        return (
            f"on {self.images} {self.source} logits differ by at most {self.difference:.1e} "
            f"({self.allowed:.1e} allowed), the class is the same for {self.same_class} of {self.images}"
        )


def format_for(out: Path | None, wanted: ExportFormat | None) -> ExportFormat:
    """The format that was asked for, else the one of the file's ending, else ONNX.

    Raises:
        UserError: the file's ending belongs to no format, or to another one.
    """
    by_name = {suffix: form for form, suffix in SUFFIXES.items()}
    if out is None:
        return wanted or "onnx"
    if out.suffix not in by_name or wanted not in (None, by_name[out.suffix]):
        endings = SUFFIXES[wanted] if wanted else " or ".join(by_name)
        raise UserError(f"the name of the exported file must end in {endings}, unlike {out.name!r}")
    return by_name[out.suffix]


def export(saved: SavedModel, form: ExportFormat, out: Path, data_dir: Path) -> Agreement:
    """Write a model as one file, after it has reproduced the network's logits on real images.

    The file takes uint8 images (n, 3, 32, 32), any n from 1, named ``images``; it returns ``logits`` (n, classes),
    averaged over image and mirror image if the model predicts that way.

    Args:
        saved: on the CPU.
        form: of the file.
        out: the file; its folder is created if it is absent. An earlier file stays until the new one has passed.
        data_dir: where the images of the model's data set are looked for.

    Raises:
        UserError: something needed is not installed, or the file cannot be written.
        RunError: the network cannot be expressed in this format, or the file's logits are not the network's.
    """
    _refuse_what_cannot_be(saved, form)
    images, source = real_images(saved, data_dir)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)  # first: report a path that cannot be written before the work
        program = _program(saved)
        content = _onnx(program, saved.classes) if form == "onnx" else _torch_export(program, saved.classes)
        with whole_file(out) as partial:
            partial.write_bytes(content)
            run = _onnx_runner(partial) if form == "onnx" else _torch_runner(partial)
            agreement = compare(saved, run, images, source)
            if not agreement.passes:
                raise RunError(f"{form} does not give what the network gives, so no file is kept: {agreement}")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from error
    return agreement


def _refuse_what_cannot_be(saved: SavedModel, form: ExportFormat) -> None:
    if form != "onnx":
        return
    if missing := [name for name in NEEDED_FOR_ONNX if importlib.util.find_spec(name) is None]:
        raise UserError(f'ONNX needs {", ".join(missing)}: pip install "block-search[export]"')
    if 4 * sum(value.numel() for value in saved.network.state_dict().values()) > MOST_ONNX_BYTES:
        raise UserError("the network is too large for one ONNX file (2 GB); take --format torch-export")


def _program(saved: SavedModel) -> ExportedProgram:
    """The network with its preparation of images, as a graph of PyTorch's plain operations."""
    # Weights in their plain order: the exported file is not bound to the layout that is fastest in PyTorch.
    network = deepcopy(saved.network).to(memory_format=torch.contiguous_format)
    predictor = as_predictor(network, saved.flip).eval()
    example = torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8)
    try:
        return torch.export.export(predictor, (example,), dynamic_shapes={"images": {0: Dim("batch", min=1)}})
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the network cannot be traced by torch.export: {first_line(error)}") from error


def _torch_export(program: ExportedProgram, classes: tuple[str, ...]) -> bytes:
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={CLASSES: json.dumps(classes)})
    return content.getvalue()


def _onnx(program: ExportedProgram, classes: tuple[str, ...]) -> bytes:
    try:
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "batch"}},  # for the name alone; the program says that it is dynamic
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"the network cannot be written as ONNX: {first_line(error)}") from error
    assert exported is not None
    exported.model.metadata_props[CLASSES] = json.dumps(classes)
    content: bytes = exported.model_proto.SerializeToString()
    return content


def _torch_runner(path: Path) -> Callable[[Tensor], Tensor]:
    module = torch.export.load(path).module()

    def run(images: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = module(images)
            return logits

    return run


def _onnx_runner(path: Path) -> Callable[[Tensor], Tensor]:
    runtime: Any = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def compare(saved: SavedModel, run: Callable[[Tensor], Tensor], images: Tensor, source: str) -> Agreement:
    """Compare what a file gives, run as one image and as all others at once, with the network in float32."""
    expected = logits_of(saved.network, images, "float32", saved.flip)
    given = torch.cat([run(images[:1]), run(images[1:])])
    return Agreement(
        images=len(images),
        source=source,
        difference=float((given - expected).abs().max()),
        allowed=TOLERANCE * max(1.0, float(expected.abs().max())),
        same_class=int((given.argmax(1) == expected.argmax(1)).sum()),
    )


def real_images(saved: SavedModel, data_dir: Path) -> tuple[Tensor, str]:
    """Images to compare on, and what they are: the model's own validation images, if they are available.

    Fit images follow if these are fewer than `CHECKED_IMAGES`; if both together are, scikit-learn's digits replace
    them: this compares two ways to compute one function, not accuracy.
    """
    match saved.about.get("dataset"):
        case {"name": str(name)}:
            try:
                images, source = _some_images(name, data_dir)
                if len(images) == CHECKED_IMAGES:
                    return images, source
                why = f"{name} has only {len(images)}"
            except DataError:
                why = f"{name} is not at hand"
        case _:
            why = "the model does not say what it was trained on"
    images, source = _some_images("digits", data_dir)
    return images, f"{source} ({why})"


def _some_images(dataset: str, data_dir: Path) -> tuple[Tensor, str]:
    split = load_split(dataset, data_dir, DIVISION_SEED, torch.device("cpu"))
    images = torch.cat([split.validation_images, split.fit_images[:CHECKED_IMAGES]])[:CHECKED_IMAGES]
    also = " and fit" if len(split.validation_images) < CHECKED_IMAGES else ""
    return images, f"validation{also} images of {dataset}"
