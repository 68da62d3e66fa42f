"""Let this environment see the packages of another one: python scripts/link_environment.py OTHER_PYTHON.

What is installed here comes first; pip takes what it sees there as installed and does not touch it.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

where = "import sysconfig; print(sysconfig.get_path('purelib'))"
other = subprocess.run([sys.argv[1], "-c", where], capture_output=True, text=True, check=True).stdout.strip()
# addsitedir, because that folder's own .pth files (editable installs) must be read too.
link = f"import site; site.addsitedir({other!r})\n"
(Path(sysconfig.get_path("purelib")) / "other_environment.pth").write_text(link, encoding="utf-8")
