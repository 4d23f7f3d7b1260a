@echo off
rem Makes .venv beside this file and installs Resonance into it. Safe to run again: what is there is kept.
rem Another Python: set PYTHON=C:\Python312\python.exe before running this.
setlocal EnableExtensions DisableDelayedExpansion
rem UTF-8, so that folders with Chinese names are shown and passed on as they are.
chcp 65001 >nul
set PYTHONUTF8=1
cd /d "%~dp0" || exit /b 1

set "FOUND="
if defined PYTHON call :try "%PYTHON%"
if defined PYTHON if not defined FOUND goto :bad_python
if not defined FOUND call :try py -3
if not defined FOUND call :try python
if not defined FOUND call :try python3
if not defined FOUND (
    echo Error: Python 3.11 or newer is needed, and none was found.
    echo   Install it from https://www.python.org/downloads/ and tick "Add python.exe to PATH", then run this script again.
    exit /b 1
)
%FOUND% --version

if exist .venv\Scripts\python.exe goto :environment_there
if exist .venv (
    echo Error: the folder .venv is here but holds no working Python. Delete or rename it, then run this script again.
    exit /b 1
)
echo Making the virtual environment .venv
%FOUND% -m venv .venv
if errorlevel 1 (
    echo Error: the virtual environment could not be made. Install Python from https://www.python.org/downloads/ and
    echo   run this script again.
    exit /b 1
)
:environment_there
set "VENV_PYTHON=.venv\Scripts\python.exe"

echo Installing packages. This takes some minutes.
rem torch first: the pinned version decides which build everything else is installed against.
set "TORCH="
for /f "usebackq delims=" %%L in (`findstr /b /c:"torch==" requirements.txt`) do set "TORCH=%%L"
"%VENV_PYTHON%" -m pip install --quiet --disable-pip-version-check "%TORCH%" || goto :no_packages
"%VENV_PYTHON%" -m pip install --quiet --disable-pip-version-check -r requirements.txt || goto :no_packages
"%VENV_PYTHON%" -m pip install --quiet --disable-pip-version-check --no-deps -e . || goto :no_packages

echo.
.venv\Scripts\resonance.exe doctor || exit /b 1
echo.
echo Ready. Next, in this folder:
echo   .venv\Scripts\activate
echo   resonance data check YOUR_RECORDINGS
echo README.md has the whole way.
exit /b 0

:try
%* -c "import sys; sys.exit(sys.version_info < (3, 11))" >nul 2>nul && set FOUND=%*
exit /b 0

:bad_python
echo Error: PYTHON=%PYTHON% is not Python 3.11 or newer. Give another one, or none to let this script look.
exit /b 1

:no_packages
echo.
echo Error: packages could not be installed; what pip says is above.
echo   No connection to the package index? Check the network and the proxy (HTTPS_PROXY), or use a mirror:
echo     set PIP_INDEX_URL=https://mirrors.aliyun.com/pypi/simple/
echo   What is installed already is kept: run this script again.
exit /b 1
