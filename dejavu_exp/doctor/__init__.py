"""`python -m dejavu_exp.doctor`: what is wrong with a data set, an encoder, a run folder or this machine."""
