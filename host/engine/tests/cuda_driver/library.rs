//! Libraries with the names of NVIDIA's: a driver whose device is the shim, with products that a library computes on it, and a
//! compiler of a later version.

use std::fs;
use std::os::unix::fs::symlink;
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
    let parts = [("driver.cpp", include_str!("driver.cpp")), ("cublaslt.cpp", include_str!("cublaslt.cpp"))];
    let text = program() + &parts.iter().map(lined).collect::<String>();
    // The name that the loader is asked for.
    let folder = as_library("cuda-driver", &text, "libcuda.so.1")?;
    // The same file, so that the loader has one of them: both know the same streams.
    let products = folder.join("libcublasLt.so.13");
    let _ = fs::remove_file(&products);
    symlink("libcuda.so.1", products).unwrap();
    Some(folder)
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
