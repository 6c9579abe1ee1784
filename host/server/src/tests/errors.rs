//! Every bad input has its status, its field and its sentence.
