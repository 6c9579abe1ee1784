//! Libraries with the names of NVIDIA's: a driver whose device is the shim, and a compiler of a later version.

use std::fs;
use std::path::PathBuf;

use crate::shim::{built, lined, program};

const OPTIONS: [&str; 9] = [
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-shared",
    "-DPM_DRIVER",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];

/// The folder of the driver; `None`, and a line that says so, without a C++ compiler.
pub(crate) fn folder() -> Option<PathBuf> {
    let text = program() + &lined(&("driver.cpp", include_str!("driver.cpp")));
    // The name that the loader is asked for.
    as_library("cuda-driver", &text, "libcuda.so.1")
}

/// The folder of an NVRTC of CUDA 99.1, which can say that and nothing else.
pub(crate) fn late_compiler() -> Option<PathBuf> {
    let text = "extern \"C\" int nvrtcVersion(int *major, int *minor) { *major = 99; *minor = 1; return 0; }\n";
    as_library("late-nvrtc", text, "libnvrtc.so")
}

fn as_library(name: &str, text: &str, file: &str) -> Option<PathBuf> {
    let library = built(name, text, &OPTIONS)?;
    let folder = library.with_extension("folder");
    fs::create_dir_all(&folder).unwrap();
    fs::copy(library, folder.join(file)).unwrap();
    Some(folder)
}
