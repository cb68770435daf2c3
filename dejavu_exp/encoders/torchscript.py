"""Encoders that come as a program with its weights in one file: TorchScript, and archives of torch.export."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dejavu_exp import provenance
from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import IMAGES, LoadedEncoder, finish
from dejavu_exp.encoders.preprocess import Preprocess
from dejavu_exp.errors import WeightsError

if TYPE_CHECKING:
    from dejavu_exp.encoders.own_modules import OwnNetwork

EXPORTED = ("/models/model.json", "serialized_exported_program.json")
"""What only an archive of torch.export holds; the second in those of torch 2.7 and before."""
SCRIPT = "TorchScript"
EXPORT = "torch.export"


@dataclass(frozen=True)
class TorchScriptEncoder:
    """A program with its weights, from images (B, 3, H, W) to (B, dim): TorchScript, or an archive of torch.export.

    TorchScript is run by an interpreter of torch's own: no Python from the file is run, but the program can do what
    torch's operators can, which includes reading and writing files. So open only archives whose author you trust, as
    with any program. To load an archive of torch.export, torch unpickles parts of it, which runs whatever code they
    hold; that is refused unless `trust_file` is true.

    Attributes:
        weights: path of the archive, as torch.jit.save or torch.export.save wrote it.
        preprocess: how images are shown to it; the archive does not say.
        output: where the program gives a tuple, a position in it; a dict or named tuple, a name; null for a tensor. An
            output of shape (B, dim, h, w) has its mean over all positions taken.
        trust_file: True lets an archive of torch.export run code while it is loaded.
        key: where the configuration has this encoder, for errors.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    weights: str
    preprocess: Preprocess
    output: str | int | None = None
    trust_file: bool = False
    key: str = field(default="model", compare=False)

    def check(self) -> None:
        """See `Encoder.check`; also looks at what kind of archive the file is."""
        sources.check_file(self.weights, f"{self.key}.weights", "an archive that torch.jit.save wrote")
        self._kind()

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`; the program is run on two images."""
        from dejavu_exp.encoders.own_modules import try_out

        self.check()
        path, kind = self._path(), self._kind()
        network = (self._script(path) if kind == SCRIPT else self._exported(path)).float().eval()
        transform = self.preprocess.transform()
        shape = try_out(network, transform, f"{self.key}.weights={self.weights}")
        told = "" if self.output is None else f", output {self.output}"
        return finish(
            network,
            transform,
            description=f"{kind} {path.stem}, {shape[1]} px{told}",
            weights=f"file {path.name}",
            transform_text=str(transform),
            random=False,
            # The same tensors do something else in another program.
            code=provenance.hash_file(path),
        )

    def _path(self) -> Path:
        return sources.local_path(self.weights)

    def _kind(self) -> str:
        """Which of the two the file is."""
        path = self._path()
        if sources.archive_holds(path, *EXPORTED):
            if self.trust_file:
                return EXPORT
            raise WeightsError(
                f"{self.key}.weights={self.weights} is an archive of torch.export: to load it, torch runs whatever "
                f"code its pickled parts hold. Where you trust its author set {self.key}.trust_file=true, or give a "
                "TorchScript archive of the same network."
            )
        if sources.archive_holds(path, "/constants.pkl"):
            return SCRIPT
        raise WeightsError(
            f"{self.key}.weights={self.weights} is no TorchScript archive: it is cut short, or holds tensors without "
            "their network. For a state dict choose model=callable with model.function=package.module:name, which "
            "makes the network, or a timm or open_clip model; for an archive, save it again with torch.jit.save."
        )

    def _script(self, path: Path) -> OwnNetwork:
        import torch

        from dejavu_exp.encoders.own_modules import ScriptNetwork, hushed

        try:
            with hushed():
                program = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
        # torch meets a damaged archive with many kinds of error.
        except Exception as error:
            raise self._unreadable(error) from error
        return ScriptNetwork(program, self.output, self.key)

    def _exported(self, path: Path) -> OwnNetwork:
        import torch

        from dejavu_exp.encoders.own_modules import ExportedNetwork

        try:
            exported = torch.export.load(path)
        # As above.
        except Exception as error:
            raise self._unreadable(error) from error
        self._check_batch(exported)
        return ExportedNetwork(exported, self.output, self.key)

    def _check_batch(self, exported: Any) -> None:  # noqa: ANN401
        """Refuse a program that takes one number of images alone."""
        inputs = exported.graph_signature.user_inputs
        shapes = {node.name: node.meta["val"].shape for node in exported.graph.nodes if node.op == "placeholder"}
        if len(inputs) != 1 or len(shapes.get(inputs[0], ())) != 4:
            raise WeightsError(
                f"{self.key}.weights={self.weights}: its program takes {', '.join(map(str, inputs))}, and must take "
                "images alone, shape (B, 3, H, W). Export a network whose forward has one argument."
            )
        batch = shapes[inputs[0]][0]
        if isinstance(batch, int):
            raise WeightsError(
                f"{self.key}.weights={self.weights}: its program takes batches of {batch} images alone. Export it for "
                "any number: torch.export.export(network.eval(), (images,), "
                'dynamic_shapes=({0: torch.export.Dim("batch")},)), with at least two images.'
            )

    def _unreadable(self, error: Exception) -> WeightsError:
        return WeightsError(
            f"{self.key}.weights={self.weights} cannot be read as an archive of this torch ({sources.why(error)}). It "
            "may be cut short, or of a newer version: fetch or save it again."
        )
