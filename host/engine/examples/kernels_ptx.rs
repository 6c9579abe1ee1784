//! Writes the kernels' PTX, which the binary carries for machines that have a driver and no compiler: `just kernels-ptx`.
//!
//! A program that a person runs after a change of the kernels, and not a build script: building must need no NVRTC. A test
//! compares the hash in the first line of each file with the sources. Takes folders to look for NVRTC in.
#![expect(clippy::print_stdout, reason = "a tool for the terminal")]

use std::error::Error;
use std::path::{Path, PathBuf};

use pointsman_engine::cuda::{COMPILE_OPTIONS, Nvrtc, Output, Unit};

fn main() -> Result<(), Box<dyn Error>> {
    let folders: Vec<PathBuf> = std::env::args().skip(1).map(PathBuf::from).collect();
    let compiler = Nvrtc::find(&folders, u32::MAX).map_err(|none| format!("{none}: name its folder as an argument"))?;
    let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/backend/cuda/kernels/ptx");
    let options: Vec<&str> = ["--gpu-architecture=compute_80"].into_iter().chain(COMPILE_OPTIONS).collect();
    for unit in Unit::ALL {
        let (ptx, log) = compiler.compile(&unit.source(), &options, Output::Ptx)?;
        let deflated = unit.deflate(&String::from_utf8(ptx)?);
        let path = target.join(format!("{}.z", unit.name()));
        std::fs::write(&path, &deflated)?;
        println!("{}: {} bytes {log}", path.display(), deflated.len());
    }
    Ok(())
}
