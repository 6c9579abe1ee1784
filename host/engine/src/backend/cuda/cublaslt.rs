//! NVIDIA's library of products, found at run time: the functions of cuBLASLt that a product of a weight with many rows takes.
//!
//! Through libloading as NVRTC is, and for the same reasons; what the library returns is read as numbers, since a later version may
//! return one that an enum of today does not have. Three layers: the raw calls, descriptors that go with their owner, and
//! [`CublasLt`], which knows what a product of this engine is: `y = x * w^T` of row-major matrices, which the library, whose
//! matrices are column-major, is told as `y^T = w * x^T`.
#![expect(unsafe_code, reason = "cuBLASLt is a C library")]

use std::ffi::{c_int, c_void};
use std::mem::ManuallyDrop;
use std::path::{Path, PathBuf};

use libloading::Library;

use super::device::{DeviceError, Gemm, GemmAddresses, GemmOutput, in_turn};
use super::element::Element;
use super::search;

/// Names under which the library is looked for, the newest first.
const NAMES: [&str; 3] = ["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

/// The oldest version that loads its code as it is used, as the library counts.
const OLDEST: usize = 120_200;

/// Algorithms that are asked for.
const MOST_PLANS: usize = 4;

/// Numbers of the library's C interface.
const COMPUTE_32F: c_int = 68;
const TYPE_F32: c_int = 0;
const TYPE_F16: c_int = 2;
const TYPE_BF16: c_int = 14;
const DESC_TRANSA: c_int = 3;
const LAYOUT_COLUMNS: c_int = 3;
const PREFERENCE_MAX_WORKSPACE: c_int = 1;
const PREFERENCE_REDUCTIONS: c_int = 3;
/// Sums of runs of k stand in `f32` beside the result, and are added in their order: never in the type of the result, nor in whichever
/// order they come.
const REDUCTION_COMPUTE_TYPE: u32 = 2;
const TRANSPOSED: c_int = 1;

/// Why there is no library.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoCublasLt {
    /// Nowhere.
    #[error(
        "cuBLASLt was not found (libcublasLt.so, in the folders of --cuda-lib-dir, the usual ones and the loader's)"
    )]
    NotFound,
    /// One that loads all of its code at once.
    #[error("{found} is of version {version}, and {OLDEST} or later is needed")]
    TooOld {
        /// Where it was found.
        found: String,
        /// As the library counts.
        version: usize,
    },
    /// One of a later CUDA than the driver's.
    #[error(
        "{found} is of version {version}, and the driver knows CUDA {newest} at most; install one of CUDA {newest}"
    )]
    TooNew {
        /// Where it was found.
        found: String,
        /// As the library counts.
        version: usize,
        /// The newest major version that would do.
        newest: u32,
    },
    /// It does not start.
    #[error("{found} does not start: {why}")]
    DoesNotStart {
        /// Where it was found.
        found: String,
        /// What it says.
        why: DeviceError,
    },
}

/// An algorithm of the library for a product, found for some number of rows and tried for fewer.
#[derive(Debug)]
pub(crate) struct LtPlan {
    shape: Shape,
    algorithm: Algorithm,
    beta: f32,
}

/// The library, and a handle of it.
#[derive(Debug)]
pub(crate) struct CublasLt {
    calls: Calls,
    handle: Handle,
}

type Handle = *mut c_void;
type Descriptor = *mut c_void;
type Stream = *mut c_void;
type Create = unsafe extern "C" fn(*mut Handle) -> c_int;
type Destroy = unsafe extern "C" fn(*mut c_void) -> c_int;
type Version = unsafe extern "C" fn() -> usize;
type CreateDesc = unsafe extern "C" fn(*mut Descriptor, c_int, c_int) -> c_int;
type CreateLayout = unsafe extern "C" fn(*mut Descriptor, c_int, u64, u64, i64) -> c_int;
type CreatePreference = unsafe extern "C" fn(*mut Descriptor) -> c_int;
type SetAttribute = unsafe extern "C" fn(Descriptor, c_int, *const c_void, usize) -> c_int;
type Advise = unsafe extern "C" fn(
    Handle,
    Descriptor,
    Descriptor,
    Descriptor,
    Descriptor,
    Descriptor,
    Descriptor,
    c_int,
    *mut Advice,
    *mut c_int,
) -> c_int;
type Multiply = unsafe extern "C" fn(
    Handle,
    Descriptor,
    *const c_void,
    *const c_void,
    Descriptor,
    *const c_void,
    Descriptor,
    *const c_void,
    *const c_void,
    Descriptor,
    *mut c_void,
    Descriptor,
    *const Algorithm,
    *mut c_void,
    usize,
    Stream,
) -> c_int;

/// `cublasLtMatmulAlgo_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Algorithm([u64; 8]);

/// `cublasLtMatmulHeuristicResult_t`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Advice {
    algorithm: Algorithm,
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// The functions, each looked up once.
#[derive(Clone, Copy, Debug)]
struct Calls {
    create: Create,
    destroy: Destroy,
    create_desc: CreateDesc,
    destroy_desc: Destroy,
    set_desc: SetAttribute,
    create_layout: CreateLayout,
    destroy_layout: Destroy,
    set_layout: SetAttribute,
    create_preference: CreatePreference,
    destroy_preference: Destroy,
    set_preference: SetAttribute,
    advise: Advise,
    multiply: Multiply,
}

/// Something of the library that is given back with its owner.
#[derive(Debug)]
struct Owned {
    at: Descriptor,
    destroy: Destroy,
}

/// What the library is told of a product: the operation, and the layouts of its three matrices.
#[derive(Debug)]
struct Shape {
    desc: Owned,
    w: Owned,
    x: Owned,
    y: Owned,
}

// SAFETY: the handle and the descriptors belong to the library, which takes them from any thread, one at a time; neither type is
// `Sync`.
unsafe impl Send for CublasLt {}
// SAFETY: as above.
unsafe impl Send for LtPlan {}

fn check(call: &'static str, code: c_int) -> Result<(), DeviceError> {
    if code == 0 { Ok(()) } else { Err(DeviceError::Library { call, code, text: words(code) }) }
}

/// The library's words for its status.
fn words(code: c_int) -> &'static str {
    match code {
        1 => "not initialised",
        3 => "allocation failed",
        7 => "invalid value",
        8 => "architecture mismatch",
        13 => "execution failed",
        14 => "internal error",
        15 => "not supported",
        _ => "no words for it",
    }
}

// === impl Calls ===

impl Calls {
    fn of(library: &Library) -> Option<(Self, Version)> {
        // SAFETY: each type is that of the function in NVIDIA's header, the same from CUDA 12.0 on.
        unsafe {
            let calls = Self {
                create: *library.get(b"cublasLtCreate\0").ok()?,
                destroy: *library.get(b"cublasLtDestroy\0").ok()?,
                create_desc: *library.get(b"cublasLtMatmulDescCreate\0").ok()?,
                destroy_desc: *library.get(b"cublasLtMatmulDescDestroy\0").ok()?,
                set_desc: *library.get(b"cublasLtMatmulDescSetAttribute\0").ok()?,
                create_layout: *library.get(b"cublasLtMatrixLayoutCreate\0").ok()?,
                destroy_layout: *library.get(b"cublasLtMatrixLayoutDestroy\0").ok()?,
                set_layout: *library.get(b"cublasLtMatrixLayoutSetAttribute\0").ok()?,
                create_preference: *library.get(b"cublasLtMatmulPreferenceCreate\0").ok()?,
                destroy_preference: *library.get(b"cublasLtMatmulPreferenceDestroy\0").ok()?,
                set_preference: *library.get(b"cublasLtMatmulPreferenceSetAttribute\0").ok()?,
                advise: *library.get(b"cublasLtMatmulAlgoGetHeuristic\0").ok()?,
                multiply: *library.get(b"cublasLtMatmul\0").ok()?,
            };
            Some((calls, *library.get(b"cublasLtGetVersion\0").ok()?))
        }
    }

    fn layout(&self, kind: c_int, rows: usize, columns: usize) -> Result<Owned, DeviceError> {
        // SAFETY: the address is of a local, which the call fills.
        let create = |at| unsafe { (self.create_layout)(at, kind, rows as u64, columns as u64, rows as i64) };
        Owned::make("cublasLtMatrixLayoutCreate", self.destroy_layout, create)
    }

    fn shape(&self, gemm: &Gemm, rows: usize) -> Result<Shape, DeviceError> {
        let Gemm { element, k, n, output } = *gemm;
        let kind = match element {
            Element::F32 => TYPE_F32,
            Element::F16 => TYPE_F16,
            Element::Bf16 => TYPE_BF16,
        };
        let y_kind = if output == GemmOutput::Store { kind } else { TYPE_F32 };
        // SAFETY: as in `layout`.
        let create = |at| unsafe { (self.create_desc)(at, COMPUTE_32F, TYPE_F32) };
        let desc = Owned::make("cublasLtMatmulDescCreate", self.destroy_desc, create)?;
        // SAFETY: the attribute is a 32-bit number.
        unsafe { desc.set("cublasLtMatmulDescSetAttribute", self.set_desc, DESC_TRANSA, TRANSPOSED) }?;
        // Row-major n by k is column-major k by n.
        Ok(Shape {
            desc,
            w: self.layout(kind, k, n)?,
            x: self.layout(kind, k, rows)?,
            y: self.layout(y_kind, n, rows)?,
        })
    }

    fn preference(&self, workspace_bytes: u64) -> Result<Owned, DeviceError> {
        // SAFETY: as in `layout`.
        let create = |at| unsafe { (self.create_preference)(at) };
        let preference = Owned::make("cublasLtMatmulPreferenceCreate", self.destroy_preference, create)?;
        let (call, set) = ("cublasLtMatmulPreferenceSetAttribute", self.set_preference);
        // SAFETY: the attributes are a `size_t` and a 32-bit number.
        unsafe {
            preference.set(call, set, PREFERENCE_MAX_WORKSPACE, workspace_bytes as usize)?;
            preference.set(call, set, PREFERENCE_REDUCTIONS, REDUCTION_COMPUTE_TYPE)?;
        }
        Ok(preference)
    }
}

// === impl Owned ===

impl Owned {
    /// What a call puts at the address that it is given.
    fn make(
        call: &'static str,
        destroy: Destroy,
        create: impl FnOnce(*mut Descriptor) -> c_int,
    ) -> Result<Self, DeviceError> {
        let mut at = std::ptr::null_mut();
        check(call, create(&raw mut at))?;
        Ok(Self { at, destroy })
    }

    /// Sets an attribute, which the call copies.
    ///
    /// # Safety
    /// `set` is the function for what this is, and `T` the type of that attribute.
    unsafe fn set<T>(&self, call: &'static str, set: SetAttribute, which: c_int, value: T) -> Result<(), DeviceError> {
        // SAFETY: the value lives through the call, and is what the caller says.
        check(call, unsafe { set(self.at, which, (&raw const value).cast(), size_of::<T>()) })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: the library made it, and nobody else gives it back.
        unsafe { (self.destroy)(self.at) };
    }
}

// === impl CublasLt ===

impl CublasLt {
    /// Looks in `folders`, then where the loader looks, for one of the major version `newest` at most. The device's context must be the
    /// calling thread's.
    ///
    /// # Errors
    /// There is none that would do.
    pub(crate) fn find(folders: &[PathBuf], newest: u32) -> Result<Self, NoCublasLt> {
        let found = search::first(folders, &NAMES, |path| Self::open(path, newest));
        found.map_err(|none| none.unwrap_or(NoCublasLt::NotFound))
    }

    fn open(path: &Path, newest: u32) -> Option<Result<Self, NoCublasLt>> {
        // SAFETY: as for NVRTC: the file has the name of NVIDIA's library and lies where the operator or the system put it.
        let library = unsafe { Library::new(path) }.ok()?;
        // Never closed: it has state of the driver's contexts, which outlive it.
        let library = ManuallyDrop::new(library);
        let (calls, version) = Calls::of(&library)?;
        let found = path.display().to_string();
        // SAFETY: it takes nothing.
        let version = unsafe { version() };
        if version < OLDEST {
            return Some(Err(NoCublasLt::TooOld { found, version }));
        }
        if version / 10_000 > newest as usize {
            return Some(Err(NoCublasLt::TooNew { found, version, newest }));
        }
        let mut handle = std::ptr::null_mut();
        let _nobody_records = in_turn();
        // SAFETY: the address is of a local, which the call fills.
        let started = check("cublasLtCreate", unsafe { (calls.create)(&raw mut handle) });
        Some(match started {
            Ok(()) => Ok(Self { calls, handle }),
            Err(why) => Err(NoCublasLt::DoesNotStart { found, why }),
        })
    }

    /// The algorithms that the library advises for a product of so many rows, the likeliest first.
    ///
    /// # Errors
    /// The library's.
    pub(crate) fn plans(&self, gemm: &Gemm, rows: usize, workspace_bytes: u64) -> Result<Vec<LtPlan>, DeviceError> {
        let Calls { advise, .. } = self.calls;
        let (shape, preference) = (self.calls.shape(gemm, rows)?, self.calls.preference(workspace_bytes)?);
        let Shape { desc, w, x, y } = &shape;
        let mut advice = [Advice::default(); MOST_PLANS];
        let (mut n, room) = (0, MOST_PLANS as c_int);
        let to = advice.as_mut_ptr();
        // SAFETY: the descriptors are alive, and there is room for as many results as are asked for.
        let code = unsafe { advise(self.handle, desc.at, w.at, x.at, y.at, y.at, preference.at, room, to, &raw mut n) };
        check("cublasLtMatmulAlgoGetHeuristic", code)?;
        let advice = advice.into_iter().take(usize::try_from(n).unwrap_or(0));
        let good = advice.filter(|one| one.state == 0 && one.workspace as u64 <= workspace_bytes);
        let beta = if gemm.output == GemmOutput::AddToF32 { 1.0 } else { 0.0 };
        good.map(|one| Ok(LtPlan { shape: self.calls.shape(gemm, rows)?, algorithm: one.algorithm, beta })).collect()
    }

    /// Puts a product of so many rows on a stream.
    ///
    /// # Safety
    /// The addresses are of buffers on the device of the stream, as long as the plan's product wants them, until the stream has come
    /// so far; the stream is one of this thread's context.
    ///
    /// # Errors
    /// The library's.
    pub(crate) unsafe fn multiply(
        &self,
        plan: &LtPlan,
        rows: usize,
        at: GemmAddresses,
        stream: Stream,
    ) -> Result<(), DeviceError> {
        let address = |at: u64| std::ptr::without_provenance_mut::<c_void>(at as usize);
        let (one, Shape { desc, w, x, y }) = (1.0f32, &plan.shape);
        for layout in [x, y] {
            // SAFETY: the attribute is a 64-bit number.
            unsafe {
                layout.set("cublasLtMatrixLayoutSetAttribute", self.calls.set_layout, LAYOUT_COLUMNS, rows as u64)
            }?;
        }
        // SAFETY: the descriptors are alive; the scalars are read during the call, as `f32` in host memory; what lies on the device
        // is the caller's promise.
        let code = unsafe {
            (self.calls.multiply)(
                self.handle,
                desc.at,
                (&raw const one).cast(),
                address(at.w),
                w.at,
                address(at.x),
                x.at,
                (&raw const plan.beta).cast(),
                address(at.y),
                y.at,
                address(at.y),
                y.at,
                &raw const plan.algorithm,
                address(at.workspace),
                at.workspace_bytes as usize,
                stream,
            )
        };
        check("cublasLtMatmul", code)
    }
}

impl Drop for CublasLt {
    fn drop(&mut self) {
        let _nobody_records = in_turn();
        // SAFETY: the handle is this one's, and no plan is being computed.
        unsafe { (self.calls.destroy)(self.handle) };
    }
}
