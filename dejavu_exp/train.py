"""`python -m dejavu_exp.train`: train what a configuration names, measure nothing; a measurement finds it ready."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dejavu_exp import config, launch
from dejavu_exp.cells import State

if TYPE_CHECKING:
    from dejavu_exp.stages import Plan


@hydra.main(config_path=str(config.CONF_DIR), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Train the encoder, and the networks of the references, as configured."""
    with launch.told("dejavu_exp.train") as tell:
        resolved = config.resolve(cfg)
        options = resolved.pop("run")
        # Imported here: torch takes seconds, and --help must not.
        from dejavu_exp import ranks
        from dejavu_exp.stages import Plan

        if options["plan"]:
            sys.exit(launch.survey([resolved]))
        tell(State.RUNNING)
        plan = Plan(**config.build(resolved))
        with ranks.joined(plan.trainer.device_count, plan.trainer.cache) as lead:
            if lead:
                train(plan, Path(HydraConfig.get().runtime.output_dir), resolved)
        tell(State.FINISHED)


def train(plan: "Plan", run_dir: Path, resolved: Mapping[str, Any]) -> None:
    """Train all that the plan trains; what the cache has is taken from there.

    Args:
        plan: what to do.
        run_dir: gets training.json, which says where the weights lie, and W&B's files.
        resolved: the configuration the plan was built from.

    Raises:
        ConfigError: the plan trains nothing.
    """
    from dejavu_exp import report, stages, tables, training
    from dejavu_exp.errors import ConfigError

    trained_references = [reference for reference in plan.references.values() if reference.is_trained]
    if not isinstance(plan.model, training.TrainedHere) and not trained_references:
        raise ConfigError(
            "nothing to train: neither the model nor a reference is trained here. Choose model=trained, "
            "reference=two_model or reference=crop_classifier."
        )
    stages.check(plan)
    inputs = stages.training_inputs(plan, stages.name_truth(plan, stages.prepare(plan)))
    if isinstance(plan.model, training.TrainedHere):
        plan.model.train(inputs)
    for reference in trained_references:
        reference.train(inputs)
    curves = training.curves(inputs)
    tables.write_json({title: str(folder) for title, folder in inputs.folders.items()}, run_dir / "training.json")
    report.show_training(curves, inputs.folders)
    plan.tracking.log_training(curves, resolved, run_dir)


if __name__ == "__main__":
    main()
