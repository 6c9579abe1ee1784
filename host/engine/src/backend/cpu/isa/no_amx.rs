//! Tiles where the architecture has none: a type without values.

use super::{Planes, Quads, Stretch, TILE_ROWS, WeightQuads};

#[derive(Debug)]
pub(crate) enum Tiles {}

pub(crate) type TileSums = [[i32; 16]; TILE_ROWS];

impl Tiles {
    pub(crate) fn one(&self, _x: &[Quads], _w: &WeightQuads, _out: &mut [TileSums; 2]) {
        match *self {}
    }

    pub(crate) fn two(&self, _x: [&[Quads]; 2], _w: &WeightQuads, _out: &mut [[TileSums; 2]; 2]) {
        match *self {}
    }

    pub(crate) fn planes(&self, _x: &[Stretch], _w: &Planes, _out: &mut [[TileSums; 2]; 2]) {
        match *self {}
    }
}
