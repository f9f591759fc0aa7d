"""CUDA source to cubin by NVRTC, kept in a cache on disk, to a CuPy function.

A cubin is compiled once for a source with all it includes, the options, the compiler and the architecture, and
then read from ``$CUPY_KERNELS_CACHE_DIR`` (default ``$XDG_CACHE_HOME/cupy_kernels``, else
``~/.cache/cupy_kernels``). Two files hold it: the cubin, named by the digest of its bytes, and a record, named by
the digest of what it was made from, which says how it went and which cubin it is. Both are written beside their
place and renamed into it, the cubin first, so that processes never see half a file, and a cubin whose bytes do not
have the digest that its record names is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

KERNEL_DIRECTORY = Path(__file__).parent / "kernels"

# Sums and products round one by one and subnormal numbers stay, as in simattn's "simt" arithmetic. CuPy's own
# compilation forces -ftz=true, which is why it is not used here.
EXACT_OPTIONS = (
    "-std=c++17",
    "-default-device",
    "-ftz=false",
    "-fmad=false",
    "-prec-div=true",
    "-prec-sqrt=true",
    "--ptxas-options=-v",
)

SMALLEST_COMPUTE_CAPABILITY = (7, 5)
LOG_LINES_SHOWN = 20
RECORD_FORMAT = 1


class CompileError(RuntimeError):
    """A kernel did not compile; the message has its name and the first lines of the compiler's log."""


@dataclass(frozen=True)
class Variant:
    """One kernel to compile.

    Attributes
    ----------
    source
        File in ``cupy_kernels/kernels``.
    function
        Name of the kernel in it.
    macros
        Names and values of the macros that select the variant.
    """

    source: str
    function: str
    macros: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        macros = " ".join(f"{name}={value}" for name, value in self.macros)
        return f"{self.function} ({self.source}{', ' + macros if macros else ''})"


@dataclass(frozen=True)
class Cubin:
    """A compiled kernel on disk.

    Attributes
    ----------
    path
        The file.
    architecture
        What it runs on, such as "sm_90a".
    registers
        Registers of a thread.
    static_shared_bytes
        Shared memory of a thread block, without what a launch adds.
    spill_bytes
        Bytes a thread stores to and loads from local memory because registers ran out.
    stack_bytes
        Local memory of a thread.
    complaints
        What a kernel should not have: warnings of the compiler, spills, local memory. Empty if there is nothing.
    cached
        Whether it was found in the cache.
    """

    path: Path
    architecture: str
    registers: int
    static_shared_bytes: int
    spill_bytes: int
    stack_bytes: int
    complaints: tuple[str, ...] = ()
    cached: bool = field(default=False, compare=False)


# The compiler


@functools.cache
def _nvrtc() -> ModuleType:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise RuntimeError(
            "the kernels are compiled by NVRTC through cuda-bindings, which is not installed: install the extra of "
            "the CUDA version, simattn[cuda12] or simattn[cuda13]"
        ) from error
    return nvrtc  # type: ignore[no-any-return]


def _checked(results: tuple[Any, ...]) -> Any:
    """Return what a call of NVRTC returned after its status."""
    status, *values = results
    if int(status) != 0:
        _, text = _nvrtc().nvrtcGetErrorString(status)
        raise RuntimeError(f"NVRTC: {text.decode()}")
    return values[0] if len(values) == 1 else tuple(values)


@functools.cache
def _compiler() -> tuple[int, int, int]:
    """Return the version of NVRTC and the bytes of its library, which tell builds of one version apart."""
    nvrtc = _nvrtc()
    from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

    try:
        library = load_nvidia_dynamic_lib("nvrtc").abs_path
        major, minor = _checked(nvrtc.nvrtcVersion())
    except (DynamicLibNotFoundError, RuntimeError) as error:
        raise RuntimeError(
            f"NVRTC, which compiles the kernels, cannot be loaded ({str(error).splitlines()[0]}): install the extra "
            "of the CUDA version, simattn[cuda12] or simattn[cuda13], or a CUDA toolkit"
        ) from error
    return major, minor, os.stat(library).st_size if library else 0


def compiler_version() -> str:
    """Return the compiler's name and version.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    major, minor, _ = _compiler()
    return f"NVRTC {major}.{minor}"


@functools.cache
def supported_compute_capabilities() -> tuple[tuple[int, int], ...]:
    """Return the compute capabilities that NVRTC compiles for and the kernels support, ascending."""
    _compiler()
    numbers = _checked(_nvrtc().nvrtcGetSupportedArchs())
    pairs = sorted(divmod(int(number), 10) for number in numbers)
    return tuple(pair for pair in pairs if pair >= SMALLEST_COMPUTE_CAPABILITY)


def choose_architecture(capability: tuple[int, int]) -> str:
    """Return the architecture to compile for, given a device's compute capability.

    It is the device's own, ``sm_90a`` for Hopper, or, when NVRTC is older than the device, the nearest lower one
    of the same major version, whose code the device runs.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    supported = supported_compute_capabilities()
    usable = [pair for pair in supported if pair[0] == capability[0] and pair <= capability]
    if not usable:
        names = ", ".join(f"{major}.{minor}" for major, minor in supported)
        raise RuntimeError(
            f"the device has compute capability {capability[0]}.{capability[1]}, for which {compiler_version()} "
            f"compiles no kernel: expected one of {names}"
        )
    major, minor = usable[-1]
    return f"sm_{major}{minor}{'a' if (major, minor) == (9, 0) else ''}"


def check_architecture(architecture: str) -> str:
    """Return the architecture if NVRTC knows it.

    Raises
    ------
    ValueError
        If it does not.
    """
    supported = supported_compute_capabilities()
    if capability_of(architecture) not in supported:
        names = ", ".join(f"sm_{major}{minor}" for major, minor in supported)
        raise ValueError(
            f"architecture={architecture!r}: {compiler_version()} compiles for {names}, some with the suffix 'a'"
        )
    return architecture


def capability_of(architecture: str) -> tuple[int, int]:
    """Return the compute capability that an architecture's name says, (0, 0) if it is no such name."""
    match = re.fullmatch(r"sm_(\d+)(\d)[af]?", architecture)
    return (0, 0) if match is None else (int(match[1]), int(match[2]))


@functools.cache
def _cuda_headers() -> Path | None:
    from cuda.pathfinder import find_nvidia_header_directory

    directory = find_nvidia_header_directory("cudart")
    return Path(directory) if directory else None


_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*(?:"([^"\n]+)"|<([^>\n]+)>)', re.MULTILINE)


@functools.cache
def _sources(directory: Path, source: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """Return a kernel's own files and the CUDA headers it includes, by the names it includes them by.

    A header that exists nowhere is left to the compiler: it may be its own or stand behind a condition.
    """
    own = {source: (directory / source).read_bytes()}
    foreign: dict[str, bytes] = {}
    pending = [own[source]]
    while pending:
        for quoted, angled in _INCLUDE.findall(pending.pop()):
            name = (quoted or angled).decode()
            if name in own or name in foreign:
                continue
            if quoted and (directory / name).is_file():
                own[name] = (directory / name).read_bytes()
                pending.append(own[name])
            elif (headers := _cuda_headers()) is not None and (headers / name).is_file():
                foreign[name] = (headers / name).read_bytes()
                pending.append(foreign[name])
    return own, foreign


def _options(variant: Variant, architecture: str) -> tuple[str, ...]:
    macros = tuple(f"-D{name}={value}" for name, value in variant.macros)
    return (*EXACT_OPTIONS, f"-arch={architecture}", *macros)


@dataclass(frozen=True)
class _Compiled:
    succeeded: bool
    log: str
    code: bytes


def _compile(variant: Variant, architecture: str) -> _Compiled:
    """Run NVRTC."""
    nvrtc = _nvrtc()
    own, foreign = _sources(KERNEL_DIRECTORY, variant.source)
    options = [*_options(variant, architecture)]
    if foreign:
        options.append(f"-I{_cuda_headers()}")
    names = [name for name in own if name != variant.source]
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            own[variant.source],
            variant.source.encode(),
            len(names),
            [own[name] for name in names],
            [name.encode() for name in names],
        )
    )
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        if status not in (nvrtc.nvrtcResult.NVRTC_SUCCESS, nvrtc.nvrtcResult.NVRTC_ERROR_COMPILATION):
            _checked((status,))
        log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
        _checked(nvrtc.nvrtcGetProgramLog(program, log))
        code = bytearray()
        if status == nvrtc.nvrtcResult.NVRTC_SUCCESS:
            code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program)))
            _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return _Compiled(bool(code), log.rstrip(b"\0").decode(errors="replace").strip(), bytes(code))


def _resources(log: str) -> dict[str, Any]:
    """Return what the compiler's log says of a kernel, as the fields of a :class:`Cubin`."""

    def largest(pattern: str) -> int:
        return max((int(number) for number in re.findall(pattern, log)), default=0)

    spills = largest(r"(\d+) bytes spill stores") + largest(r"(\d+) bytes spill loads")
    stack = largest(r"(\d+) bytes stack frame")
    complaints = [
        line.strip() for line in log.splitlines() if re.search(r"\bwarning\b|Performance Loss|\badvisory\b", line, re.I)
    ]
    if spills:
        complaints.append(f"{spills} bytes of spills")
    elif stack:
        complaints.append(f"{stack} bytes of local memory")
    return {
        "registers": largest(r"Used (\d+) registers"),
        "static_shared_bytes": largest(r"(\d+) bytes smem"),
        "spill_bytes": spills,
        "stack_bytes": stack,
        "complaints": tuple(complaints),
    }


# The cache


@functools.cache
def _private_directory() -> tempfile.TemporaryDirectory[str]:
    """Return a directory of this process, removed when it ends."""
    return tempfile.TemporaryDirectory(prefix="cupy_kernels-")


def cache_directory() -> Path:
    """Return where the cubins are kept: an environment variable's place, or one in the user's cache."""
    chosen = os.environ.get("CUPY_KERNELS_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cupy_kernels"


def _key(variant: Variant, architecture: str) -> str:
    own, foreign = _sources(KERNEL_DIRECTORY, variant.source)
    made_from = {
        "format": RECORD_FORMAT,
        "function": variant.function,
        "sources": {name: hashlib.sha256(text).hexdigest() for name, text in {**own, **foreign}.items()},
        "options": _options(variant, architecture),
        "compiler": _compiler(),
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:32]


def _record_name(variant: Variant, architecture: str) -> str:
    return f"{variant.function}-{architecture}-{_key(variant, architecture)}.json"


def _found(directory: Path, name: str) -> Cubin | None:
    """Return a cubin of the cache, unless it is absent or damaged."""
    try:
        record: Mapping[str, Any] = json.loads((directory / name).read_bytes())
        path = directory / record["cubin"]
        if hashlib.sha256(path.read_bytes()).hexdigest() != record["sha256"]:
            return None
        resources = {**record["resources"], "complaints": tuple(record["resources"]["complaints"])}
        return Cubin(path=path, architecture=record["architecture"], cached=True, **resources)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(path: Path, content: bytes) -> None:
    """Write a file so that nobody sees it unfinished."""
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(unfinished)
        raise


def _keep(directory: Path, name: str, architecture: str, made: _Compiled) -> Cubin:
    digest = hashlib.sha256(made.code).hexdigest()
    path = directory / f"{digest}.cubin"
    cubin = Cubin(path=path, architecture=architecture, **_resources(made.log))
    resources = {name: value for name, value in asdict(cubin).items() if name not in ("path", "architecture", "cached")}
    record = {"cubin": path.name, "sha256": digest, "architecture": architecture, "resources": resources}
    directory.mkdir(parents=True, exist_ok=True)
    _write(path, made.code)
    _write(directory / name, json.dumps({**record, "log": made.log}, indent=1).encode())
    return cubin


def find(variant: Variant, architecture: str) -> Cubin | None:
    """Return a variant's cubin if the cache has it."""
    return _found(cache_directory(), _record_name(variant, architecture))


def compile_variant(variant: Variant, architecture: str) -> Cubin:
    """Return a variant's cubin, from the cache or compiled and put there.

    Parameters
    ----------
    variant
        What to compile.
    architecture
        For what; see :func:`choose_architecture`.

    Raises
    ------
    CompileError
        If it does not compile.
    RuntimeError
        If there is no compiler.
    """
    directory, name = cache_directory(), _record_name(variant, architecture)
    found = _found(directory, name)
    if found is not None:
        return found
    made = _compile(variant, architecture)
    if not made.succeeded:
        lines = made.log.splitlines()
        more = [f"… {len(lines) - LOG_LINES_SHOWN} more lines"] if len(lines) > LOG_LINES_SHOWN else []
        shown = "\n".join([*lines[:LOG_LINES_SHOWN], *more])
        raise CompileError(f"{variant} does not compile for {architecture} with {compiler_version()}:\n{shown}")
    try:
        return _keep(directory, name, architecture, made)
    except OSError as error:
        warnings.warn(
            f"the cache of compiled kernels, {directory}, cannot be written ({error.strerror}): set "
            "CUPY_KERNELS_CACHE_DIR to a directory that can; this process keeps its kernels to itself",
            RuntimeWarning,
            stacklevel=2,
        )
        return _keep(Path(_private_directory().name), name, architecture, made)


@dataclass(frozen=True)
class Attempt:
    """How compiling a variant went.

    Attributes
    ----------
    cubin
        The result, None if it failed.
    error
        Why it failed, empty if it did not.
    seconds
        How long it took.
    """

    cubin: Cubin | None
    error: str
    seconds: float


def attempt(variant: Variant, architecture: str) -> Attempt:
    """Compile a variant and say how it went, in a process of a pool for example."""
    start = time.perf_counter()
    try:
        cubin, error = compile_variant(variant, architecture), ""
    except CompileError as failure:
        cubin, error = None, str(failure)
    return Attempt(cubin, error, time.perf_counter() - start)


# CuPy


def load(variant: Variant, *, dynamic_shared_bytes: int = 0) -> Any:
    """Return a kernel on CuPy's current device as a ``cupy.cuda.Function``, compiled if need be.

    Parameters
    ----------
    variant
        The kernel.
    dynamic_shared_bytes
        Shared memory that its launches ask for.

    Raises
    ------
    RuntimeError
        If the device is not supported, the kernel does not compile, or no compiler is there.
    """
    import cupy

    capability = cupy.cuda.Device().compute_capability
    cubin = compile_variant(variant, choose_architecture((int(capability[:-1]), int(capability[-1]))))
    if cubin.complaints and not cubin.cached:
        warnings.warn(
            f"{variant} is correct but may be slow on this device: {'; '.join(cubin.complaints)}",
            RuntimeWarning,
            stacklevel=2,
        )
    kernel = cupy.RawModule(path=str(cubin.path)).get_function(variant.function)
    if dynamic_shared_bytes:
        kernel.max_dynamic_shared_size_bytes = dynamic_shared_bytes
    return kernel.kernel
