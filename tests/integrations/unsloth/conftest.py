"""What unsloth reads when it is imported."""

import atexit
import importlib.util
import os
import shutil
import tempfile

if importlib.util.find_spec("unsloth") is not None:
    written = tempfile.mkdtemp(prefix="unsloth_compiled_")  # else the current folder
    atexit.register(shutil.rmtree, written, ignore_errors=True)
    os.environ |= {
        "UNSLOTH_COMPILE_LOCATION": written,
        "UNSLOTH_COMPILE_DISABLE": "partial",  # compiling takes a minute for each of its functions
    }
