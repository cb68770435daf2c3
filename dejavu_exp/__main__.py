"""The command line: compose, check, build a plan, run it. `python -m dejavu_exp --help` shows the groups."""

import hydra

from dejavu_exp import config, launch

# The job stands in a module of its own: jobs of a sweep on other machines import it by name.
main = hydra.main(config_path=str(config.CONF_DIR), config_name="config", version_base="1.3")(launch.job)

if __name__ == "__main__":
    main()
