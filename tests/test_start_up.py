"""What is not imported before it is needed: nothing is timed here, only looked up."""

from __future__ import annotations

import subprocess
import sys

from guidancekit.listing import overview, summary
from guidancekit.registry import methods, schedules

IMPORTS = """
import contextlib, io, sys
import guidancekit
from guidancekit.cli import main

def loaded(*names):
    print([name for name in names if name in sys.modules])

with contextlib.redirect_stdout(io.StringIO()):
    main(["methods"])
    with contextlib.suppress(SystemExit):
        main(["generate", "--help"])
loaded("torch", "diffusers", "transformers", "accelerate", "gradio", "numpy")

from guidancekit import APG
loaded("gradio", "guidancekit.app", "diffusers.pipelines.pipeline_utils")
loaded("transformers.models.clip", "transformers.models.t5")
"""


def test_lists_and_help_need_no_torch_and_methods_no_pipelines():
    run = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "[]\n" * 3


def test_the_list_read_from_the_source_is_that_of_the_classes():
    lines = overview().splitlines()
    for found in methods(), schedules():
        for name, cls in found.items():
            (line,) = [line for line in lines if line.split()[:1] == [name]]
            assert line.split()[1] == cls.__name__
            assert f" {cls.paper} " in line
            assert line.endswith(summary(cls))
    assert len(lines) == len(methods()) + len(schedules()) + 5  # headings, gaps, the hint
