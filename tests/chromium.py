"""A real browser for the pages that carry scripts; .ci/run installs it."""

import shutil
import subprocess


def options(profile):
    browser = shutil.which("chromium")
    assert browser, "expected chromium: apt-get install chromium"
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    return [browser, *quiet, f"--user-data-dir={profile}", "--virtual-time-budget=2000"]


def dumped(page, profile):
    """The document of a file as it stands once its scripts have run."""
    command = [*options(profile), "--dump-dom", page.as_uri()]
    return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()


def screenshot(page, profile, picture, size=(900, 900)):
    width, height = size
    window = f"--window-size={width},{height}"
    command = [*options(profile), "--hide-scrollbars", f"--screenshot={picture}", window, page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
