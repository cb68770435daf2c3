"""The command line: compose, check, build a plan, run it. `python -m dejavu_exp --help` shows the groups."""

from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dejavu_exp import config

config.register()


@hydra.main(config_path=str(config.CONF_DIR), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Measure one model, as configured."""
    with config.spoken_errors():
        resolved = config.resolve(cfg)
        # Imported here: torch takes seconds, and --help must not.
        from dejavu_exp import pipeline, stages

        pipeline.run(stages.Plan(**config.build(resolved)), Path(HydraConfig.get().runtime.output_dir), resolved)


if __name__ == "__main__":
    main()
