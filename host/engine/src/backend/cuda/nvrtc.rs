//! NVIDIA's compiler for CUDA text, found at run time: nine functions of a library that may not be there.
//!
//! Through libloading and not through cudarc, because cudarc asks the loader for fixed names and panics without them: NVRTC
//! often lies in a folder that the loader does not search, such as a Python package's, and under the name of its version.
#![expect(unsafe_code, reason = "the compiler is a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use libloading::{Library, Symbol};

use super::search;

/// Names under which the library is looked for, the newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// The compiler.
#[derive(Debug)]
pub struct Nvrtc {
    /// Never closed: the compiler keeps state of the threads that called it, whose destructors would run after it had gone.
    library: ManuallyDrop<Library>,
    found: String,
    version: (u32, u32),
}

/// Why there is no compiler.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoNvrtc {
    /// Nowhere.
    #[error("NVRTC was not found (libnvrtc.so, in the folders of --cuda-lib-dir, the usual ones and the loader's)")]
    NotFound,
    /// A driver takes no code of a later major version than its own.
    #[error(
        "{found} is of CUDA {}.{}, and the driver takes no code of CUDA {} or later; install NVRTC {newest}, or a newer driver",
        version.0,
        version.1,
        newest.saturating_add(1)
    )]
    TooNew {
        /// Where it was found.
        found: String,
        /// Its version.
        version: (u32, u32),
        /// The newest major version that would do.
        newest: u32,
    },
}

/// Why something did not compile.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    /// A function is missing: not the library that its name says.
    #[error("NVRTC lacks {0}; is it damaged?")]
    Missing(&'static str),
    /// The compiler refused.
    #[error("NVRTC: {call} failed with {code}:\n{log}")]
    Refused {
        /// Its function.
        call: &'static str,
        /// Its error number.
        code: c_int,
        /// What it says.
        log: String,
    },
    /// A text with a zero byte.
    #[error("the source or an option holds a zero byte")]
    ZeroByte,
}

/// What is wanted of the compiler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// Text for the driver's own compiler.
    Ptx,
    /// Code for one architecture.
    Cubin,
}

type Program = *mut c_void;
type ProgramFn = unsafe extern "C" fn(*mut Program) -> c_int;
type VersionFn = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
type SizeFn = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type TextFn = unsafe extern "C" fn(Program, *mut c_char) -> c_int;
type CompileFn = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
type CreateFn = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> c_int;

impl Nvrtc {
    /// Looks in `folders`, then where the loader looks, for one of the major version `newest` at most.
    ///
    /// # Errors
    /// There is none, or what was found first is newer.
    pub fn find(folders: &[PathBuf], newest: u32) -> Result<Self, NoNvrtc> {
        let that_would_do = |path: &Path| {
            let compiler = Self::open(path)?;
            if compiler.version.0 <= newest {
                return Some(Ok(compiler));
            }
            let Self { found, version, .. } = &compiler;
            Some(Err(NoNvrtc::TooNew { found: found.clone(), version: *version, newest }))
        };
        search::first(folders, &NAMES, that_would_do).map_err(|none| none.unwrap_or(NoNvrtc::NotFound))
    }

    fn open(path: &Path) -> Option<Self> {
        // SAFETY: loading runs the library's initialisers. The file has the name of NVIDIA's compiler and lies where the
        // operator or the system put it; whoever can place a file there can replace this program as well.
        let library = unsafe { Library::new(path) }.ok()?;
        let library = ManuallyDrop::new(library);
        let compiler = Self { library, found: path.display().to_string(), version: (0, 0) };
        let version = compiler.ask_version().ok()?;
        Some(Self { version, ..compiler })
    }

    /// Where it was found.
    #[must_use]
    pub fn found(&self) -> &str {
        &self.found
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    fn ask_version(&self) -> Result<(u32, u32), NvrtcError> {
        let ask = self.symbol::<VersionFn>("nvrtcVersion")?;
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both addresses are of integers that live through the call.
        match unsafe { ask(&raw mut major, &raw mut minor) } {
            0 => Ok((u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0))),
            code => Err(NvrtcError::Refused { call: "nvrtcVersion", code, log: String::new() }),
        }
    }

    fn symbol<T>(&self, name: &'static str) -> Result<Symbol<'_, T>, NvrtcError> {
        // SAFETY: the type stands beside each use and is that of NVRTC's C interface, which has not changed since CUDA 11.1.
        unsafe { self.library.get(name) }.map_err(|_| NvrtcError::Missing(name))
    }

    /// Compiles a text that includes nothing; the bytes, and what the compiler says beside them.
    ///
    /// # Errors
    /// The text is wrong, or the compiler too old for the architecture.
    pub fn compile(&self, source: &str, options: &[&str], output: Output) -> Result<(Vec<u8>, String), NvrtcError> {
        let source = CString::new(source).map_err(|_| NvrtcError::ZeroByte)?;
        let options: Result<Vec<CString>, _> = options.iter().map(|&option| CString::new(option)).collect();
        let options = options.map_err(|_| NvrtcError::ZeroByte)?;
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let program = Compilation::create(self, &source)?;
        let compile = self.symbol::<CompileFn>("nvrtcCompileProgram")?;
        let count = c_int::try_from(options.len()).unwrap_or(c_int::MAX);
        // SAFETY: the program is alive, and so are the options' texts, which the call only reads.
        let code = unsafe { compile(program.program, count, options.as_ptr()) };
        let log = program.text("nvrtcGetProgramLogSize", "nvrtcGetProgramLog").unwrap_or_default();
        let log = CStr::from_bytes_until_nul(&log).map_or(String::new(), |text| text.to_string_lossy().into_owned());
        if code != 0 {
            return Err(NvrtcError::Refused { call: "nvrtcCompileProgram", code, log });
        }
        let bytes = match output {
            Output::Ptx => program.text("nvrtcGetPTXSize", "nvrtcGetPTX"),
            Output::Cubin => program.text("nvrtcGetCUBINSize", "nvrtcGetCUBIN"),
        };
        Ok((bytes?, log))
    }
}

/// A program of the compiler, which goes with it.
struct Compilation<'a> {
    compiler: &'a Nvrtc,
    program: Program,
}

impl<'a> Compilation<'a> {
    fn create(compiler: &'a Nvrtc, source: &CStr) -> Result<Self, NvrtcError> {
        let create = compiler.symbol::<CreateFn>("nvrtcCreateProgram")?;
        let mut program = std::ptr::null_mut();
        let none = std::ptr::null();
        // SAFETY: the source outlives the program, whose only use is in the caller; no name and no headers are given.
        let code = unsafe { create(&raw mut program, source.as_ptr(), none, 0, none.cast(), none.cast()) };
        match code {
            0 => Ok(Self { compiler, program }),
            code => Err(NvrtcError::Refused { call: "nvrtcCreateProgram", code, log: String::new() }),
        }
    }

    /// One of the results: its size is asked first.
    fn text(&self, size_of: &'static str, get: &'static str) -> Result<Vec<u8>, NvrtcError> {
        let refused = |call, code| NvrtcError::Refused { call, code, log: String::new() };
        let mut size = 0;
        let ask = self.compiler.symbol::<SizeFn>(size_of)?;
        // SAFETY: the program is alive; the size is written to a local.
        match unsafe { ask(self.program, &raw mut size) } {
            0 => {}
            code => return Err(refused(size_of, code)),
        }
        let mut bytes = vec![0u8; size];
        let read = self.compiler.symbol::<TextFn>(get)?;
        // SAFETY: the buffer has the size that the compiler said.
        match unsafe { read(self.program, bytes.as_mut_ptr().cast()) } {
            0 => Ok(bytes),
            code => Err(refused(get, code)),
        }
    }
}

impl Drop for Compilation<'_> {
    fn drop(&mut self) {
        if let Ok(destroy) = self.compiler.symbol::<ProgramFn>("nvrtcDestroyProgram") {
            // SAFETY: the program was created by this compiler and is used nowhere after this.
            unsafe { destroy(&raw mut self.program) };
        }
    }
}
