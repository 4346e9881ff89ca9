module gomitm

go 1.22
