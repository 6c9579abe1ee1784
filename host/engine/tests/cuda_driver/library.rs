//! Libraries with the names of NVIDIA's: a driver whose device is the shim, with products that a library computes on it, and a
//! compiler of a later version.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::sync::OnceLock;

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
    static FOLDER: OnceLock<Option<PathBuf>> = OnceLock::new();
    let make = || {
        let parts = [("driver.cpp", include_str!("driver.cpp")), ("cublaslt.cpp", include_str!("cublaslt.cpp"))];
        let text = program() + &parts.iter().map(lined).collect::<String>();
        // The name that the loader is asked for; and the same file, so that the loader has one of them: both know the same streams.
        as_library("cuda-driver", &text, "libcuda.so.1", Some("libcublasLt.so.13"))
    };
    FOLDER.get_or_init(make).clone()
}

/// The folder of an NVRTC of CUDA 99.1, which can say that and nothing else.
pub(crate) fn late_compiler() -> Option<PathBuf> {
    let text = "extern \"C\" int nvrtcVersion(int *major, int *minor) { *major = 99; *minor = 1; return 0; }\n";
    as_library("late-nvrtc", text, "libnvrtc.so", None)
}

fn as_library(name: &str, text: &str, file: &str, link: Option<&str>) -> Option<PathBuf> {
    let library = built(name, text, &OPTIONS)?;
    let folder = library.with_extension("folder");
    if folder.exists() {
        return Some(folder);
    }
    // Under a name of its own until it is whole: another test target may make the same.
    let own = library.with_extension(std::process::id().to_string());
    fs::create_dir_all(&own).unwrap();
    fs::copy(library, own.join(file)).unwrap();
    link.into_iter().for_each(|link| symlink(file, own.join(link)).unwrap());
    // Who was quicker has made the same.
    if fs::rename(&own, &folder).is_err() {
        fs::remove_dir_all(own).unwrap();
    }
    Some(folder)
}
