"""The documentation's own example runs, as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"


def test_a_users_own_reader_and_encoder_run_by_name(tmp_path):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "mine.py").write_text(code)
    (tmp_path / "mine.yaml").write_text('source: {target: "mine:Countries"}\nencoder: {target: "mine:Letters"}\ntable: {uri: db, name: t}\n')
    done = subprocess.run([sys.executable, "-m", "jobs", "embed", "mine.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["written"] == 3
