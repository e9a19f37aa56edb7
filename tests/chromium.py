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


def screenshot(page, profile, picture):
    command = [*options(profile), f"--screenshot={picture}", "--window-size=900,900", page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
