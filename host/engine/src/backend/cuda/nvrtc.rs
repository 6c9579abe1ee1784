//! NVIDIA's compiler for CUDA text, found at run time: eleven functions of a library that may not be there.
//!
//! Through libloading and not through cudarc, because cudarc asks the loader for fixed names and panics without them: NVRTC
//! often lies in a folder that the loader does not search, such as a Python package's, and under the name of its version.
#![expect(unsafe_code, reason = "the compiler is a C library")]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use libloading::{Library, Symbol};

use super::search;

/// Names under which the library is looked for, the newest first.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

/// Most architectures that a library may say it compiles for; one that says more is taken to be damaged.
const MOST_ARCHS: usize = 1_024;

/// Held by who searches. A library that would not do is closed, because the loader, asked for a bare name, takes one of that name that is
/// open, wherever it lies: if two threads searched at once, what one has open would hide the loader's own from the other.
static SEARCH: Mutex<()> = Mutex::new(());

/// The compiler.
#[derive(Debug)]
pub struct Nvrtc {
    /// Never closed once it may compile: it keeps state of the threads that called it, whose destructors would run after it had gone.
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
    /// Older than the device, most likely.
    #[error(
        "{found} is of CUDA {}.{} and does not say that it compiles for compute capability {}.{}; install the latest NVRTC of CUDA \
        {newest}",
        version.0,
        version.1,
        capability.0,
        capability.1
    )]
    LacksArch {
        /// Where it was found.
        found: String,
        /// Its version.
        version: (u32, u32),
        /// The device's.
        capability: (u32, u32),
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
type ArchsFn = unsafe extern "C" fn(*mut c_int) -> c_int;
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
        Self::search(folders, newest, None)
    }

    /// As [`find`](Self::find), for one that makes code for devices of this compute capability.
    ///
    /// # Errors
    /// There is none, or what was found first is newer, or knows no such device.
    pub fn find_for(folders: &[PathBuf], newest: u32, capability: (u32, u32)) -> Result<Self, NoNvrtc> {
        Self::search(folders, newest, Some(capability))
    }

    fn search(folders: &[PathBuf], newest: u32, capability: Option<(u32, u32)>) -> Result<Self, NoNvrtc> {
        let that_would_do = |path: &Path| {
            let compiler = Self::open(path)?;
            Some(match compiler.unfit(newest, capability) {
                None => Ok(compiler),
                Some(why) => {
                    // Closed: it was asked what it is, and has compiled nothing.
                    drop(ManuallyDrop::into_inner(compiler.library));
                    Err(why)
                }
            })
        };
        let _alone = SEARCH.lock().unwrap_or_else(PoisonError::into_inner);
        search::first(folders, &NAMES, that_would_do).map_err(|none| none.unwrap_or(NoNvrtc::NotFound))
    }

    /// Why it would not do.
    fn unfit(&self, newest: u32, capability: Option<(u32, u32)>) -> Option<NoNvrtc> {
        let (found, version) = (self.found.clone(), self.version);
        match capability {
            _ if version.0 > newest => Some(NoNvrtc::TooNew { found, version, newest }),
            Some(capability) if !self.archs().contains(&(capability.0 * 10 + capability.1)) => {
                Some(NoNvrtc::LacksArch { found, version, capability, newest })
            }
            _ => None,
        }
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

    /// The architectures that it makes code for, 90 for compute capability 9.0. None where it cannot say: before CUDA 11.2, and no device
    /// from after that is known to such a one.
    fn archs(&self) -> Vec<u32> {
        let (Ok(count), Ok(list)) =
            (self.symbol::<ArchsFn>("nvrtcGetNumSupportedArchs"), self.symbol::<ArchsFn>("nvrtcGetSupportedArchs"))
        else {
            return Vec::new();
        };
        let mut n = 0;
        // SAFETY: the number is written to a local.
        let counted = unsafe { count(&raw mut n) } == 0;
        let n = usize::try_from(n).ok().filter(|n| counted && *n <= MOST_ARCHS).unwrap_or(0);
        let mut archs = vec![0; n];
        // SAFETY: there is room for as many as the library said it would write.
        let listed = n > 0 && unsafe { list(archs.as_mut_ptr()) } == 0;
        archs.into_iter().filter(|_| listed).filter_map(|arch| u32::try_from(arch).ok()).collect()
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A compute capability that no compiler of this machine knows.
    const DEVICE: (u32, u32) = (99, 9);

    /// A compiler that can say what it is, and its architectures where it has some.
    fn made(folder: &Path, major: u32, archs: &[u32]) -> bool {
        let version = format!("int nvrtcVersion(int *major, int *minor) {{ return *major = {major}, *minor = 4, 0; }}");
        let count = format!("int nvrtcGetNumSupportedArchs(int *n) {{ return *n = {}, 0; }}", archs.len());
        let each: String = archs.iter().map(|arch| format!("*to++ = {arch}; ")).collect();
        let list = format!("int nvrtcGetSupportedArchs(int *to) {{ {each}return 0; }}");
        let says = if archs.is_empty() { String::new() } else { count + &list };
        std::fs::create_dir_all(folder).unwrap();
        search::stand_in(&folder.join("libnvrtc.so.12"), &format!("extern \"C\" {{ {version} {says} }}"))
    }

    fn lacking(folder: &Path) -> NoNvrtc {
        let found = folder.join("libnvrtc.so.12").display().to_string();
        NoNvrtc::LacksArch { found, version: (12, 4), capability: DEVICE, newest: 97 }
    }

    #[test]
    fn a_compiler_that_does_not_know_the_device_hides_none_that_does() {
        let folder = tempfile::tempdir().unwrap();
        let [old, silent, endless, late, good] =
            ["old", "silent", "endless", "late", "good"].map(|name| folder.path().join(name));
        let known = [80, 90, 999];
        let many = vec![999; MOST_ARCHS + 1];
        let all = [
            (&old, 12, &known[..2]),
            (&silent, 12, &[]),
            (&endless, 12, &many),
            (&late, 98, &known),
            (&good, 12, &known),
        ];
        if !all.into_iter().all(|(folder, major, archs)| made(folder, major, archs)) {
            return;
        }
        let found = |folders: &[&PathBuf], newest| {
            let folders: Vec<PathBuf> = folders.iter().map(|&folder| folder.clone()).collect();
            Nvrtc::find_for(&folders, newest, DEVICE).map(|compiler| compiler.found().to_owned())
        };
        let at = |folder: &Path| Ok(folder.join("libnvrtc.so.12").display().to_string());
        // Those that find none come first: what is found stays open, and the loader has it by its bare name.
        assert_eq!(found(&[&old], 97), Err(lacking(&old)));
        assert_eq!(found(&[&silent, &old], 97), Err(lacking(&silent)), "the first is named");
        assert_eq!(found(&[&endless], 97), Err(lacking(&endless)));
        assert!(matches!(found(&[&late, &old], 97), Err(NoNvrtc::TooNew { version: (98, 4), newest: 97, .. })));
        assert_eq!(found(&[&old, &silent, &good], 97), at(&good));
        assert_eq!(found(&[&late, &old, &good], 97), at(&good));
        assert_eq!(found(&[&old, &late, &good], 98), at(&late));
        // Who makes text for the driver asks for no device.
        let folders = [old.clone(), good.clone()];
        assert_eq!(Nvrtc::find(&folders, 97).map(|compiler| compiler.found().to_owned()), at(&old));
    }

    #[test]
    fn what_would_not_do_is_closed_and_named() {
        let folder = tempfile::tempdir().unwrap();
        if !made(folder.path(), 12, &[80, 90]) {
            return;
        }
        // For a device that those of the other test do not know either.
        let none = Nvrtc::find_for(&[folder.path().to_owned()], 97, (98, 9)).err();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        assert!(!maps.contains(&folder.path().display().to_string()), "the loader would take it for its own");
        let told = none.map(|none| none.to_string()).unwrap_or_default();
        let expect = "libnvrtc.so.12 is of CUDA 12.4 and does not say that it compiles for compute capability 98.9; install the \
            latest NVRTC of CUDA 97";
        assert!(told.ends_with(expect), "{told}");
    }
}
