//! The guest's memory: a small arena for the lists that the host passes in, dlmalloc for everything else.
//!
//! A `route` call passes about 13 lists. Each one asks the guest for memory through `cabi_realloc`, and each is freed when
//! the call returns; with a general allocator that is most of the cost of the call (`route-least-loaded`, 8 replicas: 8,064
//! wasm instructions, with the arena 3,544). Here `cabi_realloc` takes from a bump
//! arena, and the global allocator knows the arena's addresses: freeing such a block decrements a counter, and when the
//! counter reaches zero, which is when the last list of the call is dropped, the arena is empty again.
//!
//! Why not reset the arena after each call: the bindings hand the lists over as owned `Vec`s and `String`s, which a policy
//! may keep or grow. With the counter there is no rule to break. A kept list merely keeps the arena from emptying, and a
//! growing one moves out by `realloc`; when the arena is full, lists come from dlmalloc. Nothing is ever freed early.

#![expect(unsafe_code, reason = "an allocator is unsafe by nature; this module is the only place in the SDK")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};
use std::ptr::NonNull;

/// About 1,200 replicas or sequences; a larger call (a `resync` of thousands) overflows into dlmalloc.
#[cfg(target_arch = "wasm32")]
const ARENA_BYTES: usize = 64 << 10;

/// Memory for incoming lists.
#[repr(align(16))]
pub(crate) struct Arena<const N: usize> {
    bytes: UnsafeCell<[u8; N]>,
    used: Cell<usize>,
    live: Cell<usize>,
}

impl<const N: usize> Arena<N> {
    pub(crate) const fn new() -> Self {
        Self { bytes: UnsafeCell::new([0; N]), used: Cell::new(0), live: Cell::new(0) }
    }

    fn base(&self) -> *mut u8 {
        self.bytes.get().cast()
    }

    /// A block for `layout`, or none when it does not fit.
    #[inline]
    fn take(&self, layout: Layout) -> Option<NonNull<u8>> {
        // A power of two: rounding up needs no division.
        let mask = layout.align() - 1;
        let start = ((self.base() as usize + self.used.get()).checked_add(mask)? & !mask) - self.base() as usize;
        let end = start.checked_add(layout.size())?;
        if end > N {
            return None;
        }
        self.used.set(end);
        self.live.set(self.live.get() + 1);
        // SAFETY: start <= end <= N, so the result points into (or one past the end of) `bytes`.
        NonNull::new(unsafe { self.base().add(start) })
    }

    /// Whether a block came from `take`. One past the end counts for nobody: zero-sized blocks are never handed out.
    #[inline]
    fn owns(&self, block: *mut u8) -> bool {
        (block as usize).wrapping_sub(self.base() as usize) < N
    }

    /// Gives one block back; the last one empties the arena.
    #[inline]
    fn release(&self) {
        let live = self.live.get() - 1;
        self.live.set(live);
        if live == 0 {
            self.used.set(0);
        }
    }
}

/// The global allocator: dlmalloc beside the arena.
pub(crate) struct PolicyAlloc<const N: usize> {
    arena: Arena<N>,
}

impl<const N: usize> PolicyAlloc<N> {
    pub(crate) const fn new() -> Self {
        Self { arena: Arena::new() }
    }

    /// Memory for a list that the host is about to write; null when there is none. The size must not be 0.
    ///
    /// # Safety
    /// As [`GlobalAlloc::alloc`].
    #[inline]
    unsafe fn incoming(&self, layout: Layout) -> *mut u8 {
        match self.arena.take(layout) {
            Some(block) => block.as_ptr(),
            // SAFETY: the caller's promise is the one asked for.
            None => unsafe { System.alloc(layout) },
        }
    }
}

// SAFETY: a block is either dlmalloc's, and every operation is passed on, or the arena's: then it stays valid and disjoint
// from all others until its one release, because `used` only falls when no block is live. Addresses tell the two apart:
// the arena is a static, which dlmalloc never hands out. Nothing here panics or allocates.
unsafe impl<const N: usize> GlobalAlloc for PolicyAlloc<N> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on as it came.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: passed on as it came.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        if self.arena.owns(block) {
            self.arena.release();
        } else {
            // SAFETY: not the arena's, so `alloc` or `realloc` had it from dlmalloc, with this layout.
            unsafe { System.dealloc(block, layout) }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        if !self.arena.owns(block) {
            // SAFETY: as in `dealloc`.
            return unsafe { System.realloc(block, layout, new_size) };
        }
        // SAFETY: the caller promises that `new_size` is neither 0 nor too large for this alignment.
        let moved = unsafe { System.alloc(Layout::from_size_align_unchecked(new_size, layout.align())) };
        if !moved.is_null() {
            // SAFETY: both blocks are at least the smaller size long, and a new block overlaps no live one.
            unsafe { moved.copy_from_nonoverlapping(block, layout.size().min(new_size)) };
            self.arena.release();
        }
        moved
    }
}

#[cfg(target_arch = "wasm32")]
mod guest {
    use super::*;

    // SAFETY: wasm32 without atomics has one thread, and a component instance is never entered twice at once.
    unsafe impl<const N: usize> Sync for PolicyAlloc<N> {}

    #[global_allocator]
    static ALLOC: PolicyAlloc<ARENA_BYTES> = PolicyAlloc::new();

    /// The canonical ABI's way to ask a guest for memory; stands in for wit-bindgen's, which uses the global allocator.
    ///
    /// # Safety
    /// Called by the host (or by an adapter) as the canonical ABI says: `old_len` is 0, or `old` is a block of `old_len`
    /// bytes from an earlier call; `align` is a power of two and the sizes fit in memory.
    #[unsafe(no_mangle)]
    unsafe extern "C" fn cabi_realloc(old: *mut u8, old_len: usize, align: usize, new_len: usize) -> *mut u8 {
        if new_len == 0 {
            return std::ptr::without_provenance_mut(align);
        }
        let block = if old_len == 0 {
            // SAFETY: the size is not 0, and the host promises the rest.
            unsafe { ALLOC.incoming(Layout::from_size_align_unchecked(new_len, align)) }
        } else {
            // SAFETY: the host promises that `old` came from here with this layout.
            unsafe { ALLOC.realloc(old, Layout::from_size_align_unchecked(old_len, align), new_len) }
        };
        if block.is_null() {
            std::arch::wasm32::unreachable();
        }
        block
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize, align: usize) -> Layout {
        Layout::from_size_align(size, align).expect("a valid layout")
    }

    #[test]
    fn blocks_are_aligned_and_disjoint_until_the_arena_is_full() {
        let arena = Arena::<64>::new();
        let offset = |block: Option<NonNull<u8>>| block.map(|b| b.as_ptr() as usize - arena.base() as usize);
        for (size, align, expect) in
            [(3, 1, Some(0)), (8, 8, Some(8)), (1, 1, Some(16)), (4, 4, Some(20)), (41, 1, None), (40, 8, Some(24))]
        {
            assert_eq!(offset(arena.take(layout(size, align))), expect, "{size} {align}");
        }
        assert_eq!(arena.take(layout(1, 1)), None);
    }

    #[test]
    fn the_last_release_empties_the_arena_and_a_kept_block_pins_it() {
        let arena = Arena::<64>::new();
        let kept = arena.take(layout(16, 8));
        for _call in 0..2 {
            assert_ne!(arena.take(layout(16, 8)), kept);
            arena.release();
        }
        assert_eq!((arena.live.get(), arena.used.get()), (1, 48));
        arena.release();
        assert_eq!(arena.take(layout(16, 8)), kept);
    }

    #[test]
    fn a_growing_list_moves_out_with_its_content() {
        let heap = PolicyAlloc::<64>::new();
        // SAFETY: sizes are not 0, each block is used within its size and freed once with its layout.
        unsafe {
            let list = heap.incoming(layout(8, 8));
            list.copy_from_nonoverlapping(b"eight by".as_ptr(), 8);
            assert!(heap.arena.owns(list));
            let grown = heap.realloc(list, layout(8, 8), 80);
            assert!(!heap.arena.owns(grown));
            assert_eq!(std::slice::from_raw_parts(grown, 8), b"eight by");
            assert_eq!(heap.arena.live.get(), 0);
            heap.dealloc(grown, layout(80, 8));
            let large = heap.incoming(layout(65, 1));
            assert!(!heap.arena.owns(large), "what does not fit comes from the system");
            heap.dealloc(large, layout(65, 1));
        }
    }
}
