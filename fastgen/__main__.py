"""``python -m fastgen``: the command ``fastgen``."""

from fastgen.cli import app

app(prog_name="fastgen")
