"""What the released code of the papers leaves on disk, turned into run folders like those of `dejavu_exp.pipeline`."""
