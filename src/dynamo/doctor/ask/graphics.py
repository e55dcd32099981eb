"""Which NVIDIA GPUs are here, by which driver? NVML is asked through ctypes, in a process of its own."""

import glob

import msgspec

from dynamo.doctor.ask.child import ChildFailed, ask_child
from dynamo.doctor.facts import Graphics

DEVICES = "/proc/driver/nvidia/gpus/*"

_NVML = r"""
import ctypes, json
try:
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
except OSError as e:
    print(json.dumps({"absent": str(e)}))
    raise SystemExit
def call(name, *words):
    status = getattr(nvml, name)(*words)
    if status:
        nvml.nvmlErrorString.restype = ctypes.c_char_p
        raise SystemExit(f"NVML: {name}: {nvml.nvmlErrorString(status).decode()}")
def text(name, *words):
    buffer = ctypes.create_string_buffer(96)
    call(name, *words, buffer, 96)
    return buffer.value.decode(errors="replace")
call("nvmlInit_v2")
version, count = ctypes.c_int(), ctypes.c_uint()
driver = text("nvmlSystemGetDriverVersion")
call("nvmlSystemGetCudaDriverVersion_v2", ctypes.byref(version))
call("nvmlDeviceGetCount_v2", ctypes.byref(count))
gpus = []
for i in range(count.value):
    device, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    memory = (ctypes.c_ulonglong * 3)()  # total, free, used
    call("nvmlDeviceGetHandleByIndex_v2", i, ctypes.byref(device))
    call("nvmlDeviceGetCudaComputeCapability", device, ctypes.byref(major), ctypes.byref(minor))
    call("nvmlDeviceGetMemoryInfo", device, memory)
    name = text("nvmlDeviceGetName", device)
    gpus.append({"name": name, "capability": f"{major.value}.{minor.value}", "memory_bytes": memory[0]})
cuda = f"{version.value // 1000}.{version.value % 1000 // 10}"
print(json.dumps({"found": {"driver": driver, "cuda": cuda, "gpus": gpus}}))
"""


class _Nvml(msgspec.Struct):
    found: Graphics = Graphics()
    absent: str = ""


def graphics(limit_s: float, program: str = _NVML, devices: str = DEVICES) -> Graphics:
    """What NVML lists; nothing where there is neither its library nor a device.

    Raises ChildFailed if NVML fails, crashes or hangs, or if there is a device without NVML's library.
    """
    answer = ask_child(program, _Nvml, limit_s)
    if answer.absent and glob.glob(devices):
        raise ChildFailed(f"there is an NVIDIA device, but not NVML's library: {answer.absent}")
    return answer.found
