"""Object detectors of transformers as encoders: one score a class, which a tagger turns into the image's objects."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dejavu_exp.encoders import weights as sources
from dejavu_exp.encoders.base import IMAGES, LoadedEncoder, finish
from dejavu_exp.encoders.open_clip_models import read_vocabulary
from dejavu_exp.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor, nn

    from dejavu_exp.encoders.detector_modules import ClassDetector, TextDetector

ONE_CLASS_A_BOX = ("detr", "table-transformer")
"""Types (`model_type` in config.json) with a softmax over the classes and "no object"."""
SCORE_A_CLASS = ("conditional_detr", "d_fine", "deformable_detr", "rt_detr", "rt_detr_v2")
"""Types with a sigmoid a class."""
FREE_VOCABULARY = ("owlvit", "owlv2")
"""Types that look for what texts name."""
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ("*.json", "*.txt", "*.safetensors")
"""What is fetched of a model: no pickles and no code."""
NO_CLASS = "N/A"
"""What COCO's detectors call the numbers that no class has."""


@dataclass(frozen=True)
class DetectorEncoder:
    """An object detector of transformers as an encoder: the score of each class is the largest of any box.

    As in the models' own post-processing, a box of DETR, OWL-ViT or OWLv2 counts for its best class alone, and one of
    RT-DETR and its relatives for every class; that of RT-DETR also keeps only the best pairs of box and class, as many
    as there are boxes, which is left out here, since it does not reach any score worth a threshold.

    A local .bin file is read as plain tensors alone, and no code that comes with a model is run.

    Attributes:
        model: a name on the Hugging Face hub, e.g. "PekingU/rtdetr_r50vd", or the path of a folder that holds
            config.json, preprocessor_config.json and the weights.
        vocabulary: for OWL-ViT and OWLv2 only, and needed there: path of a text file with one tag a line, or the name
            of a shipped one, e.g. "coco".
        template: the text for a tag of the vocabulary; "{}" stands for the tag.
        weights: "hub" for the model's own, whether from the hub or the folder; "random" for a trial with a folder.
        seed: of random weights.
        key: where the configuration has this encoder, for errors.
    """

    reads: ClassVar[frozenset[str]] = IMAGES
    model: str
    vocabulary: str | None = None
    template: str = "a photo of a {}"
    weights: str = sources.HUB
    seed: int = 0
    key: str = field(default="tagger.encoder", compare=False)

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ConfigError(f"{self.key}.template={self.template!r}: must hold {{}} once, where the tag goes.")
        if self.weights not in (sources.HUB, sources.RANDOM):
            raise ConfigError(
                f"{self.key}.weights={self.weights}: must be {sources.HUB} or {sources.RANDOM}. For weights of your "
                f"own give their folder with {self.key}.model=FOLDER."
            )

    def check(self) -> None:
        """See `Encoder.check`; a folder is looked into, a hub model only once it is loaded."""
        try:
            import transformers  # noqa: F401
        except ImportError as error:
            raise ConfigError(
                f"{self.key}: a detector needs the package transformers: pip install 'dejavu_exp[detect]'."
            ) from error
        if self.vocabulary is not None:
            read_vocabulary(self.vocabulary)
        if self._path().is_dir():
            self._config(self._complete(self._path()))
        elif not HUB_NAME.fullmatch(self.model):
            raise self._unavailable("there is no such folder")
        elif self.weights == sources.RANDOM:
            raise ConfigError(
                f"{self.key}.weights=random: is for the folder of a model, and {self.key}.model={self.model} is none. "
                f"Give a folder with config.json and preprocessor_config.json."
            )

    def load(self) -> LoadedEncoder:
        """See `Encoder.load`."""
        from dejavu_exp.encoders.detector_modules import ClassDetector, TextDetector

        return self._loaded(ClassDetector, TextDetector, "best score of each class")

    def load_boxes(self) -> LoadedEncoder:
        """The detector with its boxes: what `surest_boxes` gives, the classes being those that columns are of.

        Places are shares of the sides of the image; where `boxes_square`, shares of its longer side.

        Raises:
            ConfigError: as for `check`, or the image processor cuts something off, so that nobody knows the places.
            WeightsError: as for `load`.
        """
        from dejavu_exp.encoders.detector_modules import ClassBoxes, TextBoxes

        loaded = self._loaded(ClassBoxes, TextBoxes, "boxes, surest first")
        processor = loaded.transform.processor  # type: ignore[attr-defined]
        if getattr(processor, "do_center_crop", False):
            raise ConfigError(
                f"{self.key}.model={self.model}: do_center_crop is true in preprocessor_config.json, so the model does "
                "not see all of an image. Set it to false."
            )
        return loaded

    @property
    def boxes_square(self) -> bool:
        """True where the model pads an image to a square, of which boxes are then shares."""
        config = self._config(self._path() if self._path().is_dir() else self._fetch())
        return bool(config.model_type == "owlv2")

    def _loaded(self, of_classes: type[ClassDetector], of_texts: type[TextDetector], gives: str) -> LoadedEncoder:
        self.check()
        folder = self._path() if self._path().is_dir() else self._fetch()
        config = self._config(folder)
        transform = DetectorTransform.of(self._read(folder, "AutoImageProcessor"), self.key)
        model = self._build(folder, config)
        detector: nn.Module
        if config.model_type in FREE_VOCABULARY:
            classes = read_vocabulary(str(self.vocabulary))
            detector = of_texts(model, self._embed_texts(model, folder, classes))
            how = f"one class a box, {len(classes)} tags, template {self.template!r}"
        else:
            columns, classes = self._columns(config)
            one_class = config.model_type in ONE_CLASS_A_BOX
            detector = of_classes(model, columns, one_class=one_class)
            how = "one class a box" if one_class else "every class of a box"
        return finish(
            detector,
            transform,
            description=f"transformers {config.model_type} {self._name()}, {gives}, {how}",
            weights=self._label(),
            transform_text=transform.text(),
            random=self.weights == sources.RANDOM,
            classes=classes,
        )

    def _path(self) -> Path:
        return Path(self.model).expanduser()

    def _name(self) -> str:
        """The model in a report: without the path of a folder, which says nothing about it."""
        return self._path().resolve().name if self._path().is_dir() else self.model

    def _label(self) -> str:
        if self.weights == sources.RANDOM or not self._path().is_dir():
            return sources.label(self.weights, self.model, self.seed)
        return f"folder {self._name()}"

    def _complete(self, folder: Path) -> Path:
        lacking = _lacks(folder, weights=self.weights != sources.RANDOM)
        if lacking:
            raise self._unavailable(f"{folder} has no {lacking}")
        return folder

    def _fetch(self) -> Path:
        """The hub model's folder in the cache, downloaded where the cache does not hold it whole."""
        from huggingface_hub import constants, errors, snapshot_download

        try:
            folder = Path(snapshot_download(self.model, local_files_only=True))
            if not _lacks(folder, weights=True):
                return folder
        except errors.LocalEntryNotFoundError:
            pass
        if constants.HF_HUB_OFFLINE:
            raise self._unavailable("it is not in the cache, and HF_HUB_OFFLINE forbids downloads")
        try:
            sources.require_answer(self.model, f"{constants.ENDPOINT}/{self.model}", self.key)
            folder = Path(snapshot_download(self.model, allow_patterns=list(FILES)))
        except WeightsError as error:
            reason = (
                sources.why(error.__cause__) if error.__cause__ else "not in the cache, and downloads are forbidden"
            )
            raise self._unavailable(reason) from error
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unavailable(sources.why(error)) from error
        return self._complete(folder)

    def _config(self, folder: Path) -> Any:  # noqa: ANN401
        """The model's configuration; it must be a detector, and have a vocabulary where it needs one alone."""
        config = self._read(folder, "AutoConfig")
        if config.model_type not in (*ONE_CLASS_A_BOX, *SCORE_A_CLASS, *FREE_VOCABULARY):
            raise ConfigError(
                f"{self.key}.model={self.model}: a model of type {config.model_type} is no object detector that is "
                f"known here: {', '.join((*ONE_CLASS_A_BOX, *SCORE_A_CLASS, *FREE_VOCABULARY))}. Choose one of these; "
                f"for a classifier there are tagger=timm_classifier and tagger=open_clip."
            )
        if (config.model_type in FREE_VOCABULARY) != (self.vocabulary is not None):
            raise ConfigError(
                f"{self.key}.vocabulary is null, and {config.model_type} must be told what to look for: give a text "
                f"file with one tag a line, or coco."
                if self.vocabulary is None
                else f"{self.key}.vocabulary={self.vocabulary}: {config.model_type} knows its own classes alone. Set "
                f"{self.key}.vocabulary=null, or choose a model of type {' or '.join(FREE_VOCABULARY)}."
            )
        return config

    def _read(self, folder: Path, kind: str) -> Any:  # noqa: ANN401
        """One of the small parts of a folder, through a class of transformers."""
        import transformers

        try:
            # False instead of nothing: transformers would ask at the terminal whether to run the model's own code.
            return getattr(transformers, kind).from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # A damaged file, or one that wants to run code of its own, fails in many ways.
        except Exception as error:
            raise self._unavailable(f"{kind}: {sources.why(error)}") from error

    def _build(self, folder: Path, config: Any) -> Any:  # noqa: ANN401
        """The network with its weights, which must be complete."""
        import transformers

        free = config.model_type in FREE_VOCABULARY
        auto: Any = getattr(transformers, f"AutoModelFor{'ZeroShot' if free else ''}ObjectDetection")
        if self.weights == sources.RANDOM:
            with sources.seeded(self.seed):
                return auto.from_config(config, trust_remote_code=False)
        try:
            with sources.seeded(self.seed), quiet():
                model, report = auto.from_pretrained(
                    folder,
                    config=config,
                    local_files_only=True,
                    trust_remote_code=False,
                    weights_only=True,
                    output_loading_info=True,
                )
        # As above.
        except Exception as error:
            raise self._unavailable(f"its weights cannot be read: {sources.why(error)}") from error
        missing = sorted(report["missing_keys"])
        if missing:
            # transformers would make them up, with a warning.
            raise self._unavailable(f"{len(missing)} tensors are missing from its weights, the first {missing[0]}")
        return model.eval()

    def _embed_texts(self, model: Any, folder: Path, tags: tuple[str, ...]) -> Tensor:  # noqa: ANN401
        """The embedding of each tag's text, shape (tags, dim)."""
        import torch

        tokenizer = self._read(folder, "AutoTokenizer")
        length = model.config.text_config.max_position_embeddings
        texts = [self.template.replace("{}", tag) for tag in tags]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        tower = getattr(model, model.config.model_type)
        with torch.no_grad():
            found = tower.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
        embedded: Tensor = found.pooler_output
        return embedded

    def _columns(self, config: Any) -> tuple[list[int | None], tuple[str, ...]]:  # noqa: ANN401
        """The output column of each class of the model, and the names of the columns; equal names share one."""
        named: Mapping[int, str] = config.id2label
        names = [named.get(index, NO_CLASS).strip() for index in range(len(named))]
        classes = tuple(dict.fromkeys(name for name in names if name != NO_CLASS))
        if sorted(named) != list(range(len(named))) or not classes:
            raise ConfigError(
                f"{self.key}.model={self.model}: id2label in config.json must name the classes 0 to "
                f"{len(named) - 1}, one a number."
            )
        if not getattr(config, "use_focal_loss", True):
            raise ConfigError(
                f"{self.key}.model={self.model}: use_focal_loss is false in config.json, and {config.model_type} is "
                f"known here only with a sigmoid a class. Choose another model, e.g. PekingU/rtdetr_r50vd."
            )
        position = {name: column for column, name in enumerate(classes)}
        return [position.get(name) for name in names], classes

    def _unavailable(self, reason: str) -> WeightsError:
        return WeightsError(
            f"{self.key}.model={self.model}: cannot be had ({reason}). Connect to the network once, so that it lands "
            f"in the cache, or give the path of a folder with config.json, preprocessor_config.json and "
            f"model.safetensors, as save_pretrained of transformers writes it."
        )


@dataclass(frozen=True)
class DetectorTransform:
    """A detector's own image processor, to one size for all images, so that they can be stacked.

    A processor that keeps the sides' proportion pads at the right and below to the square of its longest side; the
    mask of valid pixels, which the network uses, is the fourth channel.

    Attributes:
        processor: of transformers.
        padded_px: side of that square; None for a processor with one size.
    """

    processor: Any
    padded_px: int | None

    @classmethod
    def of(cls, processor: Any, key: str) -> DetectorTransform:  # noqa: ANN401
        """Find the size in what the processor says of itself.

        Raises:
            ConfigError: it gives each image a size of its own.
        """
        size = dict(processor.size or {})
        if processor.do_resize and size.get("height") and size.get("width"):
            return cls(processor, None)
        longest = size.get("longest_edge") or max(size.get("max_height") or 0, size.get("max_width") or 0)
        if not processor.do_resize or not longest:
            raise ConfigError(
                f"{key}.model: preprocessor_config.json has do_resize={processor.do_resize} and size={size}, which "
                f"sets no largest size. Set do_resize to true and size to height and width, or to shortest_edge and "
                f"longest_edge, pixels."
            )
        return cls(processor, int(longest))

    def __call__(self, image: Image.Image) -> Tensor:
        """An RGB image to float32, shape (3, H, W), or (4, H, W) with the mask (0 or 1) last."""
        import torch

        options: dict[str, Any] = {}
        if self.padded_px is not None:
            options = {"do_pad": True, "pad_size": {"height": self.padded_px, "width": self.padded_px}}
        found = self.processor(images=image, return_tensors="pt", **options)
        pixels: Tensor = found["pixel_values"][0].float()
        if "pixel_mask" not in found:
            return pixels
        return torch.cat([pixels, found["pixel_mask"][0][None].float()])

    def text(self) -> str:
        """All that decides what comes out."""
        import transformers

        what = f"{type(self.processor).__name__} {self.processor.to_json_string()} padded to {self.padded_px}"
        return f"{what}, transformers {transformers.__version__}"


def _lacks(folder: Path, *, weights: bool) -> str:
    """What a folder must have and this one has not; an empty text if nothing."""
    if not (folder / "config.json").is_file():
        return "config.json"
    if not any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json")):
        return "preprocessor_config.json"
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    return "" if has_weights or not weights else "file of type .safetensors"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the bar and the table of tensors that transformers shows while it reads weights."""
    from transformers import utils

    logging: Any = utils.logging
    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()
