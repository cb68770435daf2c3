"""The command line: compose, check, build a plan, run it. `python -m dejavu_exp --help` shows the groups."""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dejavu_exp import config
from dejavu_exp.errors import DejavuError

config.register()


@hydra.main(config_path=str(config.CONF_DIR), config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Measure one model, as configured."""
    try:
        resolved = config.resolve(cfg)
        # Imported here: torch takes seconds, and --help must not.
        from dejavu_exp import pipeline, stages

        pipeline.run(stages.Plan(**config.build(resolved)), Path(HydraConfig.get().runtime.output_dir), resolved)
    except DejavuError as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
