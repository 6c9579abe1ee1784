//! A library with the driver's name, whose device is the shim.

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

/// The folder of the library; `None`, and a line that says so, without a C++ compiler.
pub(crate) fn folder() -> Option<PathBuf> {
    let text = program() + &lined(&("driver.cpp", include_str!("driver.cpp")));
    let library = built("cuda-driver", &text, &OPTIONS)?;
    let folder = library.with_extension("folder");
    fs::create_dir_all(&folder).unwrap();
    // The name that the loader is asked for.
    fs::copy(library, folder.join("libcuda.so.1")).unwrap();
    Some(folder)
}
