"""The paper's experiments, one command a table or figure: ``python -m samples.paper table1 --scale cpu``."""
