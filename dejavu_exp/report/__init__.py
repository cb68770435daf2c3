from dejavu_exp import tables


def write(run_dir, facts, scores, shown):
    tables.write_json(facts, run_dir / "figures.json")
    tables.write(scores, run_dir / "scores.parquet")


def show(facts, run_dir):
    print(facts["verdict"], facts["counts"], facts["notes"], run_dir)
