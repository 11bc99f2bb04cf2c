import sys

if sys.platform == "win32":
    sys.exit("error: this project runs on Linux and macOS, and on Windows in WSL 2")
