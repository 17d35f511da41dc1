# ruff: noqa: E501
"""Pairs of each kind that bug reports of graders are about, and what only looks like them.

A row is `=` or `!` for equal or different, and two answers; which of them is gold makes no
difference.
"""

from __future__ import annotations

import time

import pytest

from verifier import verify_answer

KINDS = {
    "thousands": r"""
= 32,\! 349 | 32349
= 11,\! 111,\! 111,\! 100 | 11111111100
= 111, \! 111, \! 111 | 111111111
= 14 {, }916 | 14916
= 10{,}000 | 10000
= 10,\!000 | 10{,}000
= 1,\!234.5 | 1234.5
= \$32,\! 348 | 32348
= \frac{12}{5,\! 525} | \frac{12}{5525}
= \{1,\!000, 2,\! 000\} | \{1000, 2000\}
= (1,\! 000, 2) | (1000, 2)
= 32\!,349 | 32349
= -1,\! 234 | -1234
= 1\,234\,567 | 1234567
! 32, 349 | 32349
! 32,\! 34 | 3234
! 32,\! 349 | 32
! 32,\! 349 | 32,350
! 32,\! 349 | 3234 9
! 32,\ 349 | 32349
! 32,\; 349 | 32349
! 1234,\!567 | 1234567
! 1.5,\! 000 | 1.5
! 1.5,\! 000 | 15000
! 4,\,-8 | 4-8
! (32,\! 349) | (32, 349)
! 1,\! 2,\! 3 | 123
= 1,\! 2,\! 3 | 1,2,3
= a=4,\,-8,\,-10 | -10,-8,4
= 1{,}234{,}567 | 1,234,567
= 1,\!234,\!567 | 1{,}234{,}567
! 1,\!234 | 1.234
! 1,234 | 1.234
= \text{1,234} | 1234
= 12,\! 345 \text{ cm} | 12345
! 12,\! 345 | 12, 345
= (1{,}000, 2) | (1000,2)
! (1,000) | (1000)
! 0.1,\!234 | 0.1234
! 100,000,000 | 100,000
! 100,000,000 \pi | 100,000
! 111,111 | 111
! 111,111,111 | 111,111
! 333,333 | 333
! 100,000 | 100, 0
= 1,625 | 1, 625
= 1,625 | 1625
= 100,\! 000 | 100,000
! (1,000) | 1000
""",
    "times and ratios": r"""
! 12:00 | 1:00
! 10:30 | 21:63
! 10:30 | 5:15
! 1:0 | 5:0
! 0:1 | 0:5
! 12:00 | 24:00
! 0:5 | 0
! 1:0 | 1
! 12:30 | 24:60
! 2:30 | 1:15
! 7:05 | 7:5
! 7:05 PM | 7:05 AM
! 7:05 PM | 8:05 PM
! 19:05 | 7:05
! 19:05 | 7:05 AM
! 6:00 PM | 6
! 6 PM | 6
! 12:00 | 12
! 10:30 | \frac{1}{3}
! 12:00 AM | 12:00 PM
! 7:05:30 | 7:05:31
! 10:20:30 | 1:2:3
! 1:2:0 | 2:4:1
! 1:2:0 | 2:4:0
! 4:6 | 3:2
! 1:2 | 1:2:3
! 12:00 | 12:00:01
= 1:0 | 1:0
= 1:0 | 1 : 0
= 0:5 | 0 : 5
= 7:05 | 7:05
= 7:05 | 07:05
= 7:05 | 7:05 PM
= 7:05 PM | 7:05 p.m.
= 7:05 \text{ p.m.} | 7:05pm
= 19:05 | 7:05 PM
= 05\!:\!00 | 5:00
= 4\!:\!51\!:\!06 \text{ p.m.} | 4:51:06 PM
= 5:05(PM) | 5:05 PM
= 1:58am | 1:58 AM
= 4:6 | 2:3
= 2:4:6 | 1:2:3
= 4:6 | \frac{2}{3}
= 12:1 | 24:2
= 3:100 | 6:200
! 10:75 | 2:15
= 6:4:2 | 3:2:1
= 0.5:1 | 1:2
= t = 7:05 | 7:05
= 6 \text{ PM} | 6:00 PM
= 3:4:5 | 6:8:10
! 3:4:5 | 6:8:11
! 0:0 | 1:1
! 0:0 | 5:0
! 0:1 | 0:2
! 1:0 | 0:1
! 5:0 | \infty
! 1:0:1 | 2:0:2
= 1:0:1 | 1:0:1
! 00:30 | 00:60
! 9:5 | 18:10
! 2:05 | 2:5
! 11:59 | 11:60
! 23:59 | 11:59
= 23:59 | 11:59 PM
! 24:30 | 12:30 AM
= 25:50 | 1:2
= 3:5 | 0.6
! 3:50 | 0.06
! 1:30 | 90
! 1:30 PM | 1:30 AM
! noon | 12
= 2:15PM | 2:15 PM
= 2:15 PM | 14:15
! 2:15 PM | 15:15
! 12:15 PM | 0:15
= 12:15 AM | 0:15
= x:y = 4:6 | 2:3
! x:y = 2:3 | 3:2
! x:y = 2:3 | y:x = 2:3
= 7:05, 8:10 | 8:10, 7:05
! 7:05, 8:10 | 7:05
= 12:00 PM | 12:00
= 0:00 | 12:00 AM
! 3:00 | 3
! 3:00 | 3:0
! 3:00 | 3:00:30
= 3:00 | 3:00:00
""",
    "exact and rounded": r"""
= \frac{1}{3} \approx 0.333 | 1/3
= 1/3 | x=1/3\approx0.333
= \frac{1}{3} ≈ 0.333 | \frac13
= \sqrt{2} \approx 1.41 | \sqrt 2
= \sqrt{2} \approx 1.414 | \sqrt{2}
= \frac{2}{3} \approx 0.667 | 2/3
= \frac{2}{3} \approx 0.666 | 2/3
= x = \frac{1}{3} \approx 0.333 | x = \frac13
= \frac{40}{3} \approx 13.33 \text{ minutes} | \frac{40}{3}
= \frac{1}{\sqrt 3} \approx 58\% | \frac{\sqrt3}{3}
= \$\dfrac23 \approx \$0.67 | \frac23
= \frac{1}{3} (\approx 0.333) | \frac{1}{3}
= \frac13 \text{ (approximately } 0.333) | \frac13
= 10\pi \approx 31.4 | 10\pi
= 10\pi \approx 31.42 \text{ cm} | 10\pi
= \arctan 2 \approx 63.4^\circ | \arctan 2
= 2^{40} \approx 1.1 \times 10^{12} | 2^{40}
= x \approx 11 | 11
= \approx 11 | 11
= \sqrt{50} \approx 7 | 5\sqrt2
= \frac{17}{3} = 5\frac23 \approx 5.67 | \frac{17}{3}
= \frac{1}{3} \approx 0.333, \frac{2}{3} \approx 0.667 | \frac13, \frac23
= (\frac13 \approx 0.33, 2) | (\frac13, 2)
! \frac{1}{3} \approx 0.334 | 1/3
! \frac{1}{3} \approx 0.34 | 1/3
! x = 1/3 \approx 1.3 | 1/3
! x = 5+5+1 = 1/3 \approx 11 | 1/3
! \frac{1}{3} \approx 0.333 | 0.333
! \frac{1}{3} \approx 0.333 | \frac{1}{4}
! \frac{1}{3} \approx 0.333 | 0.3333
! \pi \approx 3.14 | 3.14
! \pi \approx \frac{22}{7} | \pi
! \pi \approx \frac{22}{7} | \frac{22}{7}
! \sqrt{2} \approx 1.42 | \sqrt 2
! \sqrt{2} \approx 14.1 | \sqrt 2
! \sqrt{2} \approx -1.41 | \sqrt2
! \frac{1}{3} = 0.333 | \frac13
! \frac{1}{3} = 0.333 | 0.333
! 0.5 \approx 5 | 5
! x \approx 0.333 | \frac13
! \frac13 \text{ or } 0.333 | \frac13
! 5 approximately | 5
! approximately 5 or 6 | 5
! \frac{1}{3} \approx 0.34 | \frac{1}{3} \approx 0.35
! \frac13 \approx 0.333 \approx 0.4 | \frac13
! 2\pi r \approx 6.28 r | 6.28r
! x \approx 5 | y \approx 5
""",
    "chains": r"""
= x = 5+5+1 = 11 | 11
= 5+5+1 = 11 | 11
= 2+3 = 5 | x = 5
= C = 2\pi r = 10\pi | 10\pi
= x = 2t+3t = 5t | 5t
= x = \frac{1}{2} = 0.5 | \frac12
= x = 3\text{ m} = 300 \text{ cm} | 3 \text{ m}
= \frac{6}{4} = \frac{3}{2} = 1.5 | \frac32
= AB = \sqrt{3^2+4^2} = 5 | 5
= 0.5 = 50\% | \frac12
! x = 5+5+2 = 11 | 11
! x = 5+5+2 = 11 | 12
! x = 5+5+1 = 7 = 11 | 11
! z = 1 + 1 = 2 | z = 3+3 = 2
! 9 = 189 | 189
! 5 = 6 | 6
! 5 = 6 | 5
! x = 5 = 6 | 6
! x = 2t+3t = 6t | 6t
! x = 3\text{ m} = 30 \text{ cm} | 3 \text{ m}
! C = 10 = 2\pi r = 12 | 12
! 2x + z = 1 | 1
! a+3z=0 | 0
! a^2+b=0 | 0
! 7 = 11a+c | 11a+c
! n = 3k | 3
! x=5+5+2=11 | x=11
! x = 11 | x = 12 = 11
= x = \frac{7}{2} = 3.5 | 3.5
= 2^{10} = 1024 | 1024
! 2^{10} = 1025 | 1024
! 2^{10} = 1025 | 1025
= 3! = 6 | 6
! x = 3 = 4 | 4
! x = 3, y = 4 = 5 | 3, 5
= \frac{1}{2} \approx 0.5 | \frac12
= 0.5 \approx 0.50 | 0.5
! 0.25 \approx 0.3 | 0.3
= 0.25 \approx 0.3 | 0.25
! \frac{22}{7} \approx 3.14159 | \frac{22}{7}
! \frac{22}{7} \approx \pi | \frac{22}{7}
! \frac{22}{7} \approx \pi | \pi
= \ln 2 \approx 0.693 | \ln 2
! \ln 2 \approx 0.7 | \ln 3
! \ln 2 \approx 0.694 | \ln 2
= -\frac13 \approx -0.33 | -\frac13
! -\frac13 \approx 0.33 | -\frac13
= 0.\overline{3} \approx 0.33 | \frac13
= \frac23 \approx 66.7\% | \frac23
! \frac23 \approx 67.7\% | \frac23
= \sqrt{3}\text{ cm} \approx 1.73\text{ cm} | \sqrt3 \text{ cm}
! \sqrt{3}\text{ cm} \approx 1.73\text{ m} | \sqrt3 \text{ cm}
! \sqrt{3}\text{ cm} \approx 1.73\text{ cm} | \sqrt3 \text{ m}
= 1000000 \approx 10^6 | 1000000
= 123456 \approx 1.23 \times 10^5 | 123456
! 123456 \approx 1.24 \times 10^5 | 123456
! 123456 \approx 123000 | 123456
= \frac{1}{3} \simeq 0.33 | \frac13
! 1/3 \approx 0.333, 0.5 | 0.333, 0.5
= 1/3 \approx 0.333, 0.5 | 1/3, 1/2
! 5 \approx 6 | 5
! 5 \approx 6 | 6
! 10 \approx 3\pi | 10
= \{\frac13 \approx 0.33, 1\} | \{\frac13, 1\}
= S = \frac{1}{3} \approx 0.333 | S = \frac13
= V = \pi r^2 h = 12\pi \approx 37.7 | 12\pi
! V = \pi r^2 h \approx 37.7 | 37.8
= 2+3=5 | 6-1 = 5
! \frac12 = 5\% | \frac12
""",
    "names": r"""
= |AB|=1 | 1
= S_1:S_2 = 7:32 | 7:32
= S_{1}:S_{2}=7:32 | 7:32
= V_{1}:V_{2}=11:21 | 11:21
= S_{MBCN}:S=7:32 | 7:32
= \frac{NO}{BO}=\frac{1}{\sqrt 6} | \frac{1}{\sqrt 6}
= \frac{AB}{CD} = \frac{2}{3} | \frac23
= AB/CD = 2/3 | \frac23
= AB=4, CD=5 | 4, 5
= AB=4, CM=5 | 4, 5
= AB = 5 | 5
= 5 = AB | 5
= BE = 5 | 5
= \overline{AB} = 5 | 5
= |\vec{a}| = 3 | 3
= |\overrightarrow{AB}| = 3 | 3
= \left|AB\right| = 7 | 7
= AB = 5 \text{ cm} | 5
= AB = BC = 5 | 5
= \angle ABC = 60^\circ | 60
= \angle ABC = 60^\circ | 60^\circ
= \angle A = 30° | 30
= m\angle ABC = 60 | 60
= S_{\triangle ABC} = 12 | 12
= [ABC] = 12 | 12
= \text{Area} = 12 | 12
= \text{Area} = 12, \text{Perimeter} = 14 | 12, 14
= e = \frac{\sqrt{3}}{2} | \frac{\sqrt3}{2}
= P(A) = \frac13 | \frac13
= P(A|B) = \frac13 | \frac13
= P(X=2) = 0.3 | 0.3
= P(A \cap B) = \frac13 | \frac13
= E(X) = 2.5 | \frac52
= f(2) = 7 | 7
= f(-1) = 7 | 7
= f(\frac12) = 7 | 7
= \frac{dy}{dx} = 2x | 2x
= a_3 = 2, a_{37} = 19 | a_{37} = 19, a_3 = 2
= x = -5,\ p = \frac{14}{3} | -5, \frac{14}{3}
= (p,q)=(3,2) | (3,2)
= AB=1 | BA = 1
= a:b = 2:3 | 2:3
= a:b:c = 2:3:4 | 4:6:8
= S_1:S_2 = 4:6 | 2:3
= |AB| = 1 | AB = 1
= x=y=3 | 3
= x=y=z=1 | (1,1,1)
= x=y=z=1 | x=1,y=1,z=1
= \Delta x = 5 | 5
= KM = 3 | 3
= \frac{KM}{KN} = 3 | 3
! AB=4, CD=5 | 5, 4
! AB=4, CD=5 | 4
! AB=4 | 5
! AB = 1 | CD = 1
! x=9 | y=9
! |x| = 3 | 3
! xy = 1 | 1
! xy = 6 | 6
! ab = 6 | 6
! \frac{x}{y} = 2 | 2
! |z| = 5 | 5
! \sin x = \frac12 | \frac12
! PV = nRT | nRT
! x^2 = 4 | 4
! 2x = 4 | 4
! x+y = 5 | 5
! f(2) = 7 | f(3) = 7
! f(x+1) = x^2 | f(x) = x^2
! P(A) = \frac13 | P(B) = \frac13
! P(A) = \frac13 | \frac23
! S_1:S_2 = 7:32 | 32:7
! S_1:S_2 = 7:32 | S_2:S_1 = 7:32
! x=y=z=1 | x=1
! x=y=z=1 | (1,1)
! \angle A = 30° | \angle B = 30°
! 2AB = 6 | 6
! AB + CD = 5 | 5
! AB < 5 | 5
! AB \ne 5 | 5
! AB = CD | CD
! x(3) = 12 | 12
! \text{not } x = 5 | 5
! \text{error} = 5 | 5
! |AB|=1 | -1
! y^2 = 4x | 4x
! \text{Area} = 12 | \text{Perimeter} = 12
= r = 5 | 5
= \theta = 30^\circ | 30
= \sin A = \frac35 | \sin A = 0.6
! \log x = 2 | 2
! \sqrt{x} = 3 | 3
! x! = 6 | 6
! x/2 = 3 | 3
! -x = 3 | 3
! \frac{1}{x} = 3 | 3
! |x-1| = 3 | 3
! x_1 + x_2 = 5 | 5
! x_1 x_2 = 6 | 6
! \frac{x+1}{y} = 3 | 3
! AB^2 = 25 | 25
! AB \cdot CD = 25 | 5
! (x-1)^2+y^2 = 4 | 4
! y = 4 | x = 4
= y = 2x+1 | 2x+1
= y = 2x + 1 | f(x) = 2x+1
! y = 2x + 1 | f(t) = 2t+1
= a_n = 2n+1 | 2n+1
! a_n = 2n+1 | a_n = 2n
= F = ma | ma
! x = 3 | 3y
= AB : CD = 3:4 | 3:4
= \frac{S_1}{S_2} = \frac34 | 3/4
! \frac{S_1}{S_2} = \frac34 | 4/3
! AB = 3, BC = 4 | 3, 4, 5
= AB = 3, BC = 4, CA = 5 | 3, 4, 5
! AB = 3, BC = 4 | AB = 4, BC = 3
= AB = 3, BC = 4 | BC = 4, AB = 3
= AB = 3 \text{ and } BC = 4 | 3, 4
! p=-1 \text{ and } p=\frac{15}{8} | -1
= p=-1 \text{ and } p=\frac{15}{8} | -1, \frac{15}{8}
! |AB| > 1 | 1
! \text{no solution} = 5 | 5
= \text{slope} = 3, \text{intercept} = -2 | 3, -2
= \text{slope} = 3, \text{intercept} = -2 | \text{slope} = 3, \text{intercept} = -2
! \text{slope} = 3, \text{intercept} = -2 | -2, 3
= \text{Length} = 5 \text{ cm} | 5 \text{ cm}
= k = 45, n = 2 | n=2, k=45
= P(A)=0.3, P(B) = 0.4 | 0.3, 0.4
! P(A)=0.3, P(B) = 0.4 | 0.4, 0.3
! P(A) = 0.3 | P(A) = 0.4
! P(X>2) = 0.3 | P(X<2) = 0.3
= AE = 5 | AE = 5.0
! \{x = 5\} | 6
! themodeofnotx=5 | 5
! E = 5 | e
""",
    "several cases": r"""
= p=5,q=2;p=7,q=2 | (5,2),(7,2)
= p=5,q=2;p=7,q=2 | (7,2),(5,2)
= p=5,q=2 \text{ or } p=7,q=2 | (5,2),(7,2)
= p = 5, q = 2 \quad \text{and} \quad p = 7, q = 2 | p=5,q=2;p=7,q=2
= p=5,q=2;p=7,q=2 | p=7,q=2;p=5,q=2
= p=5,q=2;p=7,q=2 | q=2,p=5;q=2,p=7
= (p,q)=(5,2),(7,2) | p=5,q=2;p=7,q=2
= (p,q)=(5,2),(p,q)=(7,2) | (5,2),(7,2)
= (p,q)=(5,2) \text{ or } (7,2) | (5,2),(7,2)
= x=1,y=2;x=3,y=4 | \{(1,2),(3,4)\}
= [{x: 1, y: 2}, {x: 3, y: 4}] | (1,2),(3,4)
= q=2,p=5;q=2,p=7 | (2,5),(2,7)
= x=1,y=2,z=3;x=4,y=5,z=6 | (1,2,3),(4,5,6)
= x=1,y=2;y=4,x=3 | (1,2),(3,4)
= x = 1 \text{ or } x = -2 | 1,-2
= (5, 8), (8, 5) | (x, y) = (5, 8) \quad \text{and} \quad (8, 5)
= (2,-1) | y=-1,x=2
= x=1,y=2;x=1,y=2 | (1,2)
! p=5,q=2;p=7,q=2 | (2,5),(2,7)
! p=5,q=2;p=7,q=2 | (5,2)
! p=5,q=2;p=7,q=2 | (5,7),(2,2)
! p=5,q=2;p=7,q=2 | 5,2,7,2
! p=5,q=2;p=7,q=2 | (5,2),(7,3)
! p=5,q=2;p=7,q=2 | (5,2,7,2)
! p=5,q=2;p=7,q=2 | x=5,y=2;x=7,y=2
! x=1,y=4;x=3,y=2 | (1,2),(3,4)
! x=1,y=2,x=3 | (1,2),(3,2)
! x=1,x=2,y=3 | (1,3),(2,3)
! p=5,q=2 | (5,2),(7,2)
! (2,-1) | x=-1,y=2
! q=2,p=5;q=2,p=7 | (5,2),(7,2)
= (x,y)=(1,2),(x,y)=(3,4) | x=1,y=2;x=3,y=4
= x=1, y=2 \text{ or } x=3, y=4 | (3,4),(1,2)
! x=1, y=2 \text{ or } x=3, y=4 | (1,2)
! x=1, y=2; x=3 | (1,2),(3,2)
! a=1,b=2;c=3,d=4 | (1,2),(3,4)
= a=1,b=2;c=3,d=4 | (1,2,3,4)
= x=\pm 1 | 1,-1
= (1,2),(1,-2) | (1,\pm 2)
""",
    "matrices": r"""
= \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} + \begin{pmatrix}5 & 6 \\ 7 & 8\end{pmatrix} | \begin{pmatrix}6 & 8 \\ 10 & 12\end{pmatrix}
= \begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix} \begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix} | \begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix}
= \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}\cdot\begin{pmatrix}1 & 0 \\ 0 & 1\end{pmatrix} | \begin{bmatrix}1 & 2 \\ 3 & 4\end{bmatrix}
= \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} - \begin{pmatrix}1 & 1 \\ 1 & 1\end{pmatrix} | \begin{pmatrix}0 & 1 \\ 2 & 3\end{pmatrix}
= 2\begin{pmatrix}1 \\ 2\end{pmatrix} + 3\begin{pmatrix}1 \\ 0\end{pmatrix} | \begin{pmatrix}5 \\ 4\end{pmatrix}
= \begin{pmatrix}1 & 1 \\ 0 & 1\end{pmatrix}^3 | \begin{pmatrix}1 & 3 \\ 0 & 1\end{pmatrix}
= \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}\begin{pmatrix}1 \\ 1\end{pmatrix} | \begin{pmatrix}3 \\ 7\end{pmatrix}
= \begin{pmatrix}a & b \\ c & d\end{pmatrix}\begin{pmatrix}x \\ y\end{pmatrix} | \begin{pmatrix}ax+by \\ cx+dy\end{pmatrix}
= Matrix([[1, 2], [3, 4]]) + Matrix([[1, 0], [0, 1]]) | \begin{pmatrix}2 & 2 \\ 3 & 5\end{pmatrix}
= Matrix([[1, 2], [3, 4]])*Matrix([[1, 0], [0, 1]]) | Matrix([[1, 2], [3, 4]])
= A = \begin{pmatrix}1 & 2\end{pmatrix} + \begin{pmatrix}1 & 2\end{pmatrix} | \begin{pmatrix}2 & 4\end{pmatrix}
= \frac{1}{2}\begin{pmatrix}2 & 4\end{pmatrix} | \begin{pmatrix}1 & 2\end{pmatrix}
= \begin{pmatrix}\sqrt2 & 0 \\ 0 & 1\end{pmatrix}^2 | \begin{pmatrix}2 & 0 \\ 0 & 1\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} + \begin{pmatrix}5 & 6 \\ 7 & 8\end{pmatrix} | \begin{pmatrix}6 & 8 \\ 10 & 13\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}\begin{pmatrix}0 & 1 \\ 1 & 0\end{pmatrix} | \begin{pmatrix}3 & 4 \\ 1 & 2\end{pmatrix}
= \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}\begin{pmatrix}0 & 1 \\ 1 & 0\end{pmatrix} | \begin{pmatrix}2 & 1 \\ 4 & 3\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}\begin{pmatrix}2 & 0 \\ 0 & 2\end{pmatrix} | \begin{pmatrix}2 & 0 \\ 0 & 8\end{pmatrix}
! \begin{pmatrix}1 & 2\end{pmatrix} + \begin{pmatrix}1 \\ 2\end{pmatrix} | \begin{pmatrix}2 & 4\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} + 1 | \begin{pmatrix}2 & 3 \\ 4 & 5\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} | \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix} + \begin{pmatrix}1 & 0 \\ 0 & 0\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}^2 | \begin{pmatrix}1 & 4 \\ 9 & 16\end{pmatrix}
! \begin{pmatrix}1\\2\end{pmatrix}\begin{pmatrix}3\\4\end{pmatrix} | \begin{pmatrix}3\\8\end{pmatrix}
! \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}, \begin{pmatrix}5 & 6 \\ 7 & 8\end{pmatrix} | \begin{pmatrix}6 & 8 \\ 10 & 12\end{pmatrix}
! \begin{pmatrix}1&2\\3&4\end{pmatrix}^{-1} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
! 2\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}2&2\\3&4\end{pmatrix}
= \begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1&0\\0&1\end{pmatrix}\begin{pmatrix}0&1\\1&0\end{pmatrix} | \begin{pmatrix}2&1\\4&3\end{pmatrix}
= \begin{pmatrix}1\\1\end{pmatrix}+t\begin{pmatrix}2\\3\end{pmatrix} | \begin{pmatrix}1+2t\\1+3t\end{pmatrix}
! \begin{pmatrix}1\\1\end{pmatrix}+t\begin{pmatrix}2\\3\end{pmatrix} | \begin{pmatrix}1+2t\\1+2t\end{pmatrix}
= \begin{vmatrix}1&2\\3&4\end{vmatrix} | -2
= 3\left(\begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}1&0\end{pmatrix}\right) | \begin{pmatrix}6&6\end{pmatrix}
= -\begin{pmatrix}1&2\end{pmatrix}+\begin{pmatrix}1&3\end{pmatrix} | \begin{pmatrix}0&1\end{pmatrix}
""",
    "repetition": r"""
= \{1,2,2\} | \{1,2\}
= \{1,2\} | \{2,1,1,2\}
= (3,2),(3,2),(5,1) | (3,2),(5,1)
= (3,2),(3,2),(5,1) | (5,1),(3,2)
= (3,2),(3,2) | (3,2)
= 1,2,2 | 1,2
= 1,2,2 | 2,1
= \{2, \sqrt{4}, 3\} | \{2,3\}
= \{\frac12, 0.5, 3\} | \{\frac12,3\}
= \{1,1\} | \{1\}
= \{1,1\} | 1
= x=3,x=3 | 3
= x=1, x=2, x=2 | 1, 2
= x = 2, 2, 3 | 2, 3
= \{\sqrt2, \sqrt2, 1\} | \{1,\sqrt2\}
= \{\sqrt2, \frac{2}{\sqrt2}, 1\} | \{1,\sqrt2\}
! (1,2) | (1,2,2)
! (1,2,2) | \{1,2\}
! (1,2,2) | (1,1,2)
! [1,2,2] | [1,2]
! [3,3] | 3
! (3,3) | 3
! \{1,2,2\} | \{1,2,3\}
! \{1,2,2\} | \{1\}
! \{1,1,1\} | \{1,2\}
! (3,2),(3,2),(5,1) | (3,2),(1,5)
! (3,2),(3,2),(5,1) | (3,2)
! 1,2,2 | 1,2,3
! 1,2,2 | 122
! AB=4, CD=4 | 4
! \begin{pmatrix}1\\2\\2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
! x=3,y=3 | 3
! x=3,y=3 | x=3
! \{(1,2),(2,1)\} | \{(1,2)\}
! 5, 6 | 5
= AB=4, CD=4 | 4, 4
= 2,2 | (2,2)
! \{a,a,b\} | \{a\}
= \{a,a,b\} | \{b,a\}
! \{1,2\},\{1,2\} | \{1\}
= 3,3,2 \text{ or } 2 | 2,3
! (1,1),(2,2) | (1,2)
! (1,1) | 1
! (0,0,0) | (0,0)
! [1,1] | [1]
! 1,1 | (1,1,1)
= A,A,C | A,C
! AA | A
! \{(1,2)\} | (2,1)
! (1,2),(1,2) | (2,1)
! ((1,2),(1,2)) | (1,2)
! 2,2 | 2
! 60^\circ, 60^\circ, 60^\circ | 60^\circ
= 2,2,3 | 2,3
= x=2,2 | 2
= x = 3, x = 3.0 | 3
= \{(1,2),(1,2)\} | \{(1,2)\}
= 1,2,1 | \{1,2\}
! 1,2,1 | (1,2)
""",
    "percent in words": r"""
= 28\% | 28 pct
= 28\% | 28 per cent
= 28\% | 28 percentage points
= 28\% | 28 percent
= 28\% | 28 \text{ pct}
= 28\% | 28\text{ per cent}
= 28\% | 28\text{ percentage points}
= 28\% | 28pct
= 28\% | 28 Per Cent
= 28\% | 28 percentage
= 28\% | 28 percent points
= 28 pct | 0.28
= 28 pct | 28
= 12.5 per cent | 12.5\%
= 12.5 per cent | \frac18
= 33\frac13 \text{ per cent} | 33\frac13\%
= 28 pct. | 28\%
! 28\% | 29 pct
! 28 pct | 0.0028
! 28 pct | 2800
! 28 per cent | 28 cents
! 28 cents | 28\%
! 28 pct | 28 points
! 28\% | 28 percentile
! 0.28 | 28
! 28 per dollar | 28\%
! 50\% | 50 pct of 10
! 28 pct | 0.28\%
= 0.5 per cent | 0.005
! 5 per cent | 5 per centimeter
= 5\text{ per cent} | \frac{1}{20}
! 28 pct | 28 pounds
! 28 percentage points | 28 points
! pct | 28
= 100 percent | 1
! 28\% | 28 \text{ cm}
! 28\% | 28^\circ
= 28\% | 28 \text{ units}
! 0.56, 56\% | 0.56
""",
    "quotation marks": r"""
= '42' | 42
= "42" | 42
= “42” | 42
= ‘42’ | 42
= "'42'" | 42
= '\frac12' | 0.5
= 'yes' | yes
= "(1, 2)" | (1,2)
= ['1', '2', '3'] | [1, 2, 3]
= \text{'42'} | 42
= ``42'' | 42
! '42' | 43
! '42 | 43
! '4','2' | 42
! "4" "2" | 42
! f' | f
! 5' | 5''
= "x = 3" | 3
= '1/2' | 0.5
! "4" 2 | 42
! '' | 42
= "A" | A
! "A" | B
= \text{"yes"} | yes
! 6' | 6''
= '3', '5' | 3, 5
= "3","5" | 3, 5
= "C" | C
""",
    "decimals inside": r"""
= (0.6, 2.5] | (\frac35, \frac52]
= (0.5, 1.25) | (\frac12, \frac54)
= [0.5, 1] | [\frac12, 1]
= (0.6666666666666666, 1] | (\frac23, 1]
= (1.4142136, 2) | (\sqrt2, 2)
= \begin{pmatrix}0.5\\0.2\end{pmatrix} | \begin{pmatrix}\frac12\\ \frac15\end{pmatrix}
= \begin{pmatrix}0.3333333333333333\\0.2\end{pmatrix} | \begin{pmatrix}\frac13\\ \frac15\end{pmatrix}
= \{0.5, 0.25\} | \{\frac14,\frac12\}
= (50\%, 0.25) | (\frac12, \frac14)
= (1.0, 2.0) | (1,2)
= (-\infty, 0.5) | x < \frac12
= x \ge 0.5 | [\frac12, \infty)
= (0.1, 0.2) | (\frac{1}{10}, 0.20)
! (0.6, 2.6667] | (\frac35, \frac83]
! (0.33, 1) | (\frac13, 1)
! (0.333, 1] | (\frac13, 1]
! \begin{pmatrix}0.33\\0.2\end{pmatrix} | \begin{pmatrix}\frac13\\ \frac15\end{pmatrix}
! \{0.33, 1\} | \{\frac13, 1\}
! (3.14, 0) | (\pi, 0)
! [1.41, 2] | [\sqrt2, 2]
! (0.6, 2.5] | (\frac35, \frac52)
! (0.6, 2.5] | [\frac35, \frac52]
= \{(0.5, 1)\} | (\frac12, 1)
= (0.5, 0.25), (1, 2) | (\frac12,\frac14), (1,2)
= [0.25, 0.5) \cup (0.5, 1] | [\frac14, \frac12) \cup (\frac12, 1]
! [0.33, 1] | [\frac13, 1]
= \left[0.3333333333333333, 1\right] | [\frac13, 1]
= \{1.4142135623730951, 1\} | \{\sqrt2, 1\}
! \{1.4142, 1\} | \{\sqrt2, 1\}
= Matrix([[0.5, 0.25]]) | \begin{pmatrix}\frac12 & \frac14\end{pmatrix}
= \begin{pmatrix}1.7320508 & 1\end{pmatrix} | \begin{pmatrix}\sqrt3 & 1\end{pmatrix}
""",
    "equations that hold for positive letters only": r"""
! |x| = 3 | x = 3
! \sqrt{x^2} = 3 | x = 3
! |y| = 2x | y = 2x
= \sqrt{x} = 3 | \sqrt{x} - 3 = 0
= \ln x + y = 3 | \ln x = 3 - y
= 2|x| = 6 | |x| = 3
""",
    "alternatives and memberships": r"""
! x = 2 \text{ or } y = 3 | (2,3)
! x = 2 \text{ or } y = 3 | x=2, y=3
= x = 2 \text{ or } y = 3 | x=2 \text{ or } y=3
= x \in \{1,2\} | x = 1 \text{ or } x = 2
= x \in \{1,2\} | x = 1, 2
= x \in \{1,2\} | 1, 2
= (x,y) \in \{(1,2),(3,4)\} | (x,y) = (1,2), (3,4)
! x \in \{1,2\} | y \in \{1,2\}
! x \in \{1,2\} | x = 1
= x \in \{1\} | x = 1
! x \notin \{1,2\} | \{1,2\}
! 2 \text{ or } 3 | (2,3)
= 2 \text{ or } 3 | 2, 3
= \max_{x \in [0,1]} f(x) = 7 | 7
""",
    "rounded in words, chains of tuples": r"""
= \frac12 \text{ or } 0.5 | \frac12
= \frac12 \text{ or } 0.5 | 0.5
! \frac12 \text{ or } 0.6 | 0.5
= \frac{2}{7} \doteq 0.286 | 2/7
= x = \pm\sqrt{9} = \pm 3 | \pm 3
= x = \pm\sqrt{9} = \pm 3 | 3, -3
! x = \pm\sqrt{9} = \pm 4 | \pm 4
= (x,y) = (1+1, 3) = (2,3) | (2,3)
! (x,y) = (1+1, 3) = (2,4) | (2,4)
= \frac27 \text{ or approximately } 0.286 | 2/7
= \frac27 \text{ or about } 0.286 | 2/7
= \frac27 \text{ (about 0.286)} | 2/7
= \frac27, \text{ or approximately } 0.286 | 2/7
= \frac27 \text{ or about } 0.29 | 2/7
! \text{about } 5 | 6
! 5 \text{ or about } 6 | 5
! \frac27 \text{ or } 0.286 | 2/7
""",
    "names, more of them": r"""
! 2 \text{ and } 2 | 2
! a = b = c | c
! a=b=2c | 2c
= y = f(x) = 2x+1 | 2x+1
= A\cap B = \{1,2\} | \{1,2\}
! A\cap B = \{1,2\} | \{1,3\}
! A\cap B = \{1,2\} | A \cup B = \{1,2\}
= A \cup B = (1,2] | (1,2]
= \cos A = \frac12 | \frac12
! \cos A = \frac12 | \sin A = \frac12
! \cos x = \frac12 | \frac12
! \cos A = \frac12 | \cos B = \frac12
= \cos A = \frac12 | 2\cos A = 1
= \text{Number of ways} = 24 | 24
= \text{number of ways} = 24 | 24
! \text{not} = 24 | 24
! \text{Number of ways} > 24 | 24
= \text{least possible value} = 24 | 24
! \text{number of boys} = 3 | \text{number of girls} = 3
= T(5)=12 | 12
= N(5)=12 | 12
! x(3) = 12 | 12
= \varphi(12) = 4 | 4
= Q(-1) = 12 | 12
= C(5,2) = 10 | 10
= f(f(2)) = 3 | 3
= g(f(1)) = 7 | 7
= f(g(x)) = 2x+1 | 2x+1
! f(g(x)) = 2x+1 | g(f(x)) = 2x+1
! f(2)f(3) = 5 | 5
! f(x)g(x) = 5 | 5
! f(x)+g(x) = 5 | 5
= \angle{BAC} = 45^{\circ} | 45
= \measuredangle ABC = 45^\circ | 45
= \measuredangle ABC = 45^\circ | \angle ABC = 45^\circ
= \tan\angle ABC = 2 | 2
= \cos(\angle ABC) = \frac12 | 0.5
! \cos\angle ABC = \frac12 | \sin\angle ABC = \frac12
! \angle ABC = 45 | \tan \angle ABC = 45
! m\angle A = 5 | m\angle B = 5
= \Pr(A) = \frac14 | \frac14
= \mathbb{P}(A) = \frac14 | \frac14
= \mathbb{E}[X] = 3 | 3
= E[X] = 3 | 3
= \text{Var}(X) = 3 | 3
= \text{area}(ABC) = 24 | 24
= \operatorname{Area}(ABC) = 24 | 24
= [\triangle ABC] = 24 | 24
= \frac{[ABC]}{[DEF]} = 4 | 4
= [ABC]/[DEF] = 4 | 4
= [ABC]:[DEF] = 4:1 | 4:1
! \frac{[ABC]}{[DEF]} = 4 | \frac{[DEF]}{[ABC]} = 4
= [ABCD] = 24 | 24
= \text{Area: } 4 | 4
= \text{Area: } 4, \text{Perimeter: } 5 | 4, 5
! \text{Area: } 4 | \text{Perimeter: } 4
= \text{Domain: } (1,2] | (1,2]
= \text{slope: } \frac12 | \frac12
! \text{not: } 5 | 5
! \text{boys} : \text{girls} = 2:3 | 3:2
= \text{boys} : \text{girls} = 2:3 | \text{boys} : \text{girls} = 2:3
= \min f(x) = 7 | 7
= \min_{x} f(x) = 7 | 7
= f(x)_{\max} = 7 | 7
= f_{\max}(x) = 7 | 7
! \min f(x) = 7 | \max f(x) = 7
= \lVert v \rVert = 5 | |v| = 5
= f^{-1}(3) = 2 | 2
= f'(1) = 4 | 4
! f'(1) = 4 | f(1) = 4
= P_3(x) = x^3 | x^3
! f(x+1) = x^2 | f(x) = x^2
! \text{set: } x | 5
! \sin(3) = 5 | 5
! \ln(3) = 5 | 5
! \pi(3) = 5 | 5
! \gamma(3) = 5 | \beta(3) = 5
! e(3) = 5 | 5
! A = [1,2,3] | [A,B,C]
""",
    "percent with a word": r"""
= 20\% \text{ increase} | 20\%
! 20\% \text{ increase} | 20\% \text{ decrease}
! 20 \text{ cm} | 20\%
""",
    "matrices, named and in chains": r"""
= \begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}3\\4\end{pmatrix}=\begin{pmatrix}4\\6\end{pmatrix} | \begin{pmatrix}4\\6\end{pmatrix}
! \begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}3\\4\end{pmatrix}=\begin{pmatrix}4\\7\end{pmatrix} | \begin{pmatrix}4\\7\end{pmatrix}
! \begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}3\\4\end{pmatrix}=\begin{pmatrix}4&6\end{pmatrix} | \begin{pmatrix}4\\6\end{pmatrix}
! \begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}3\\4\end{pmatrix}=\begin{pmatrix}4&6\end{pmatrix} | \begin{pmatrix}4&6\end{pmatrix}
= A+B = \begin{pmatrix} 4 \\ 6 \end{pmatrix} | \begin{pmatrix} 4 \\ 6 \end{pmatrix}
= A^2 = \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix} | \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix}
= A^{-1} = \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix} | \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix}
= A^{-1} = \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix} | A^{-1} = \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix}
! A^{-1} = \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix} | A = \begin{pmatrix} 4 & 1\\ 6 & 2 \end{pmatrix}
! A+B = \begin{pmatrix} 4 \\ 6 \end{pmatrix} | A-B = \begin{pmatrix} 4 \\ 6 \end{pmatrix}
! 2A = \begin{pmatrix} 4 \\ 6 \end{pmatrix} | \begin{pmatrix} 4 \\ 6 \end{pmatrix}
! x+y = \begin{pmatrix} 4 \\ 6 \end{pmatrix} | \begin{pmatrix} 4 \\ 6 \end{pmatrix}
= A + B = \begin{pmatrix}1\\2\end{pmatrix}+\begin{pmatrix}3\\4\end{pmatrix}=\begin{pmatrix}4\\6\end{pmatrix} | \begin{pmatrix}4\\6\end{pmatrix}
= \begin{pmatrix}1&2\\3&4\end{pmatrix} | \left(\begin{array}{cc}1&2\\3&4\end{array}\right)
""",
    "thousands, more signs": r"""
= 1,\!\!234 | 1234
= 1,\! \! 234 | 1234
= 1,234,\!567 | 1234567
! 1,234,5 | 12345
""",
    "quotation marks of texts": r"""
= \text{``42''} | 42
= «42» | 42
= \text{``even''} | even
= ``42'' | 42
! 5'' | 5'
""",
    "times in words": r"""
= 12:00\text{ noon} | 12:00 PM
= \text{noon} | 12:00 PM
= 12 \text{ noon} | \text{noon}
= \text{midnight} | 12:00 AM
! noon | midnight
! noon | 12
! 12:30 noon | 12:30 PM
""",
    "cases by index and under a brace": r"""
= x_1=1,y_1=2;x_2=3,y_2=4 | (1,2),(3,4)
= x_{1}=2; y_{1}=3; x_{2}=3; y_{2}=2 | (2,3),(3,2)
= x_{1}=2; x_{2}=3; y_{1}=3; y_{2}=2 | (2,3),(3,2)
= (x_1,y_1)=(2,3), (x_2,y_2)=(3,2) | (2,3),(3,2)
! x_1=1,y_1=2;x_2=3,y_2=4 | (1,3),(2,4)
! x_1=1,y_1=2;x_2=3,y_2=4 | (1,2)
! x_1=2,x_2=3 | (3,2)
= x_1=2,x_2=3 | (2,3)
! x_1=1,y_2=2;x_2=3,y_1=4 | (1,2),(3,4)
= \begin{cases}x=1\\y=2\end{cases} | (1,2)
= \begin{cases} x = 1, \\ y = 2 \end{cases} | x=1,y=2
= \left\{\begin{array}{l}x=1\\y=2\end{array}\right. | (1,2)
= \left\{\begin{array}{l}x=1\\y=2\end{array}\right. \text{ or } \left\{\begin{array}{l}x=3\\y=4\end{array}\right. | (1,2),(3,4)
= \begin{cases}x&=1\\y&=2\end{cases} | (1,2)
! \begin{cases}x=1\\y=2\end{cases} | (2,1)
! f(x) = \begin{cases}x=1\\y=2\end{cases} | (1,2)
! f(x) = \begin{cases}1 & x=1\\2 & x=2\end{cases} | 1, 2
""",
    "neighbours of names, systems and alternatives": r"""
! \text{boys: } 5, \text{girls: } 6 | 6, 5
! \text{Answer: no} | yes
! \text{Case 1: } 5 | 6
! \text{Proof: } 5 = 6 | 6
! \text{False: } 5 | 5
! \text{Incorrect: } 5 | 5
! \text{Wrong: } 5 | 5
! \text{Not possible: } 5 | 5
! \text{Nothing} = 5 | 6
! \text{never} = 5 | 6
! f(3)=5 | f(4) = 5
! f(5) = 2 | 5
! N(5) = 2 | N = \frac25
! T(5) = 10 | 2
! P(5) = 10 | T(5) = 10
! C(5,2) = 10 | (5,2)
! f(a)=b | b = a
! f(a) = b | f(b) = a
! S(x) = 2x | T(x) = 2x
! \phi(x) = 2 | x = 2
! \max(a,b) = 5 | 5,6
! \max(x,y) = 5 | x = 5
! \min f(x) = 3 | \min g(x) = 3
! f(x)_{\max} = 7 | f(x) = 7
! f(x)_{\max} = 7 | f(x)_{\min} = 7
! f_{\max} = 7 | f = 7
! [ABC] = 5 | [ABD] = 5
! [A,B,C] = 5 | 5
! \frac{[ABC]}{[DEF]} = 4 | \frac14
! A \cap B = \{1\} | 1 = A
! A\cap B = \emptyset | A \cup B = \emptyset
! A + B = \begin{pmatrix}1\\2\end{pmatrix} | A B = \begin{pmatrix}1\\2\end{pmatrix}
! A^T = \begin{pmatrix}1&2\end{pmatrix} | A = \begin{pmatrix}1&2\end{pmatrix}
! A X = \begin{pmatrix}1\\2\end{pmatrix} | X = \begin{pmatrix}1\\2\end{pmatrix}
! \cos 2A = \frac12 | \cos A = \frac12
! \cos^2 A = \frac12 | \frac14
! \cos^2 A = \frac12 | \cos A = \frac12
! \cos A + \cos B = 1 | 1 = \cos A
! \cos A = \frac12 | A = \frac12
! \cos A = \frac12 | A = 60^\circ
! \tan(A) = 1 | \tan(B) = 1
! \sin A = \frac12, \cos A = \frac12 | \cos A = \frac12
= \sin A = \frac35, \cos A = \frac45 | \frac35, \frac45
! \sin A = \frac35, \cos A = \frac45 | \frac45, \frac35
! x = 2 \text{ or } y = 3 | y = 2 \text{ or } x = 3
! x = 2 \text{ or } 3 | (2,3)
! 2 \text{ or } 2 \text{ or } 3 | 2
! A \text{ or } A \text{ or } B | A
! 1,234,\!56 | 123456
! 1,\! 2345 | 12345
! 1,\!\!23 | 123
! 12,345,\!678 | 12, 345678
! 1,234,5678 | 12345678
! \frac12, \approx 0.6 | \frac12
! 0.5, \approx 0.6 | 0.5
! 5, 6 \approx 6.1 | 6
= 5, 6 \approx 6 | 5, 6
! \frac12 about \frac13 | \frac12
! a about 5 | 6
! about 5 | 5.2
! 5 about | 6
! roughly half | 0.6
! 3 \text{ or roughly } \pi | \pi
! 22/7 \text{ or roughly } 3.14 | 3.14
! \begin{cases}x+y=3\\x-y=1\end{cases} | (3,1)
! \begin{cases}x=1\\y>2\end{cases} | (1,2)
! \begin{cases}x=1\\y=2\\z=3\end{cases} | (1,2)
= \begin{cases}x=1\\y=2\\z=3\end{cases} | (1,2,3)
= \begin{cases}x=1,\\y=2;\end{cases} \begin{cases}x=3,\\y=4.\end{cases} | (1,2),(3,4)
= \begin{cases}x=1\\y=2\end{cases},\quad\begin{cases}x=3\\y=4\end{cases} | (1,2),(3,4)
= \left\{\begin{array}{l}{x=1} \\ {y=2}\end{array}\right. | (1,2)
= \left\{\begin{matrix}x=1\\y=2\end{matrix}\right. | (1,2)
! y = \begin{cases}x=1\\x=2\end{cases} | 1,2
! f(x)=\begin{cases}x+1 & x>0\\ -x & x\le0\end{cases} | x+1
! x_1=1,y_1=2;x_2=3,y_2=4 | x_1=1,y_1=2;x_2=4,y_2=3
= x_1=1,y_1=2;x_2=3,y_2=4 | x_2=3,y_2=4,x_1=1,y_1=2
! x_1=1,y_1=2,x_2=3 | (1,2),(3,2)
= a_1=1,a_2=2,b_1=3,b_2=4 | a_1=1,a_2=2,b_1=3,b_2=4
! 12:00 noon | 12:00 midnight
! 20% increase | 0.8
! 20\% \text{ off} | 80\%
! 20\% \text{ of } 50 | 20\%
! -20\% \text{ change} | 20\% \text{ change}
! x^2 = 9 | x = 3
! x|x| = 4 | x^2 = 4
= x + y = 5 | y = 5 - x
= 2x+2y = 10 | x+y=5
= \frac{x}{2} + \frac{y}{3} = 1 | 3x+2y = 6
= y^2 = 4x | x = \frac{y^2}{4}
= \frac{x^2}{4}+\frac{y^2}{3}=1 | 3x^2+4y^2=12
= x^2+y^2-2x=0 | (x-1)^2+y^2=1
! x^2+y^2-2x=0 | (x+1)^2+y^2=1
= \sqrt{x}+\sqrt{y}=1 | \sqrt{y} = 1-\sqrt{x}
= x^{2/3}+y^{2/3} = 1 | y^{2/3} = 1-x^{2/3}
= x^{1/3}+y = 1 | y = 1-\sqrt[3]{x}
! x \in \{1,2\} | x \in (1,2)
! x \in \{1,2\} | (1,2)
= x \in \{-2, 2\} | x = \pm 2
= n \in \{1,2\} | \{2,1\}
= x \in \{ \frac12 \} | 0.5
! \{x \in \{1,2\}\} | 1
! x = \{1,2\} | x = 1
! S = \{1,2\}, T = \{3\} | \{1,2,3\}
= (x, y) \in \{(1,2)\} | (1,2)
= x = y = \frac12 | (\frac12, \frac12)
= a=b=c=1 | (1,1,1)
= a = b = c = 1 | 1
= y = f(x) = x^2 | x^2
= a_n = S_n - S_{n-1} = 2n-1 | 2n-1
= x = 1, x = 2 | 1, 2
= x = 1, x = 2 | \{1, 2\}
= (x,y)=(1,2),(3,4) | \{(1,2),(3,4)\}
= m\angle ABC = 60 | \angle ABC = 60
! \tan\angle ABC = 1 | \angle ABC = 1
= x = 2 \text{ or } 3 | 2, 3
= n = 2 \text{ or } n = 2 | 2
= x = 2, 3 | [2, 3]
! x = 2 \text{ or } x = 3 | (2,3)
= f(x) = 0 \text{ or } f(x) = x | 0, x
= [ABD]/[CDE] = \frac13 | \frac13
= \frac{[ABD]}{[CDE]} = \frac{1}{3} | \frac{[ABD]}{[CDE]} = 1/3
""",
    "conventions": r"""
! 1,22 | 1.22
= f(x)=x+1 | f(t)=t+1
= f(x)=x+1 | x+1
! f(x)=x+1 | g(t)=t+1
! f(x)=x+1 | t+1
! f(x)=x+t | f(t)=t+t
= f(x,y)=x-y | f(a,b)=a-b
! f(x,y)=x-y | f(a,b)=b-a
! f(x)=x+1 | f(t)=t+2
= 45^\circ | \frac{\pi}{4}
= 45^\circ | 45
! 45^\circ | \frac{\pi}{3}
! 45 | \frac{\pi}{4}
= \frac{\pi}{4} \text{ radians} | 45^\circ
! 45^\circ | 45 \text{ radians}
= 10{,}000 | 10000
! f(a) = 3 | f(b) = 3
= ['3','5'] | 3,5
= {'x': 1, 'y': 2} | (1,2)
! 1,5 | 1.5
! 3,14 | 3.14
= 180^\circ | \pi
= 90^\circ | \frac{\pi}{2} \text{ rad}
! 90^\circ | \pi
! 0.785398^\circ | 45
! 57.29577951308232 | 1 \text{ rad}
! 45^\circ, 60^\circ | \frac{\pi}{4}
= 45^\circ, 60^\circ | \frac{\pi}{4}, \frac{\pi}{3}
= \theta = 45^\circ | \frac{\pi}{4}
= f(x) = x^2 | f(u) = u^2
! f(x) = x^2 | f(u) = x^2
! f(x) = 3 | f(x) = 4
= f(x) = 3 | 3
! f'(x) = 2x | f(x) = 2x
! f(x)=a x | f(a)=x a
""",
    "neighbours": r"""
! 5:00 | 5
! 1:1 | 2:1
= 3 : 4 | 3:4
! 12:34:56 | 12:34
! x=1:2 | 2:1
! 9/15 | 9:15
= P = (1,2) | (1,2)
! M(1,2) = 5 | (1,2)
= (x, y) = (1, 2) | x = 1, y = 2
! (y,x) = (1,2) | (x,y) = (1,2)
= (y,x) = (1,2) | (x,y) = (2,1)
! x = 1, 2 | (1,2,3)
! f(1) = 2, f(2) = 3 | 3, 2
= f(1) = 2, f(2) = 3 | 2, 3
= f(1) = 2, f(2) = 3 | f(2) = 3, f(1) = 2
! f(1) = 2, f(2) = 3 | f(1)=3, f(2)=2
! x \in \{1,2\} | 1
= x \in \{1,2,2\} | \{2,1\}
! x^2 = 9 = 3^2 | 9
! y = 3x = 6 = 7 | 7
! 4 = 2 + 3 | 4
! 1 = 1 = 2 | 2
! 0 = 1 | 0
= 1 = 1 | 1
! x = y | 3
! e = 2.7 | 2.8
! \pi = 3 | 3
! \pi = 3.14 | 3.14
! \pi = 3.14 | \pi
! i = 1 | i
! e \approx 2.718 | e
! \infty = 1 | 1
! 2AB = 6 | AB = 6
= 2AB = 6 | AB = 3
= 2x = 6 | x = 3
! ABC = 100 | 101
= x = 5 \text{ or } x = 5 | 5
= \{5, 5.0\} | 5
! \{5, 6\} | 5
! \{\} | \{1\}
= \emptyset | \{\}
! 1,1,2,3 | 1,2,2,4
= 1,1,2,3 | 1,2,2,3
! [1,1,2,3] | [1,2,2,3]
! (1,1,2,3) | 1,2,3
! (1,2),(3,4),(1,2) | (1,2)
= (1,2),(3,4),(1,2) | (3,4),(1,2)
! (1,2),(1,2) | (1,2,1,2)
! ((1,2),(1,2)) | ((1,2),)
! \begin{pmatrix}1&1\end{pmatrix} | 1
= 7\% | 7 pct
! 7 pct | 8 pct
! 7\% | 7 pct, 8 pct
= \text{28 percent} | 28\%
= 28 \text{ percentage point} | 28\%
= twenty | twenty
! 'twenty' | 20
! "it's 5" | 5
! “5” or “6” | 5
! '5', '6' | 5
! "5" and "6" | 56
! `5` `6` | 5
= `5` | 5
! 32,\!349 | 32.349
! 32,\!3490 | 323490
! 3,\!2349 | 32349
! ,\!349 | 349
! 32,\!34,\!900 | 3234900
! \frac{1}{3} = 0.3333333 | 0.3333333
! x \approx \frac13 | 0.333
= x \approx \frac13 | \frac13
! \approx 0.333 | \frac13
! \frac{1}{3} \approx | \frac13
! \approx | 5
! \frac13 \approx 0.333 \text{ or } 0.334 | \frac13
! \frac13 (\approx 0.334) | \frac13
! \frac13 (\approx 0.333 | \frac13
! (\approx 0.333) | 0.333
! 1/3 \approx 0.333 < 1 | 1/3
! \frac{x}{3} \approx 0.333 x | \frac{x}{3}
! \frac{1}{3} \ne 0.333 | \frac13
! 100 \approx 99.9 | 100
! 0.3 \approx 0.333 | 0.3
! 0.3 \approx 0.333 | 0.333
! |\vec a| = -3 | 3
! |AB| = |CD| | 5
! \frac{AB}{CD} = 2 | \frac{CD}{AB} = 2
! \angle ABC = 60^\circ | 30^\circ
! \angle ABC = \angle DEF | 60
! \text{Area} > 5 | 5
! \text{Answer: } 5 = 6 | 6
! x = \text{five} | 6
! S = \{1,2\} | \{1\}
= |BC| = 2\sqrt{3} | \sqrt{12}
! BC^2 = 12 | \sqrt{12}
! x+1 = 6 | 6
! AB+1 = 6 | 6
! \sqrt{AB} = 6 | 6
! \det A = 5 | 6
! P(x) = 2x | Q(x) = 2x
! f(x) = 2x | f(x,y) = 2x
! f(x,y) = x+2y | f(y,x) = x+2y
= f(x,y) = x+2y | f(y,x) = y+2x
! g(t) = t | t^2
! \begin{pmatrix}1&2\\3&4\end{pmatrix} \times 0 | 0
= \begin{pmatrix}1&2\end{pmatrix} \begin{pmatrix}3\\4\end{pmatrix} | \begin{pmatrix}11\end{pmatrix}
! \begin{pmatrix}1&2\\3&4\end{pmatrix}/\begin{pmatrix}1&0\\0&1\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
! \begin{pmatrix}1&2\\3&4\end{pmatrix}\begin{pmatrix}1&2&3\end{pmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
! \begin{pmatrix}1&0\\0&1\end{pmatrix}\begin{pmatrix}1&2\\3&4\end{pmatrix} | \begin{pmatrix}1&0\\0&1\end{pmatrix}
! \begin{pmatrix}1&2\\3&4\end{pmatrix}^T | \begin{pmatrix}1&2\\3&4\end{pmatrix}
! \begin{pmatrix}1&2\\3&4\end{pmatrix}^0 | \begin{pmatrix}1&2\\3&4\end{pmatrix}
! 2^{\begin{pmatrix}1&2\\3&4\end{pmatrix}} | 2
! array([1, 2]) + array([3, 4]) | (4,7)
""",
}
ROWS = [
    pytest.param(*row[2:].split(" | "), row[0] == "=", id=f"{kind}: {row}")
    for kind, table in KINDS.items()
    for row in table.strip().splitlines()
]


HOSTILE = {
    "chain": "x=" + "=".join([r"\sum_{n=1}^{300}\sqrt{n}"] * 70),
    "rounded": "1/3" + r"\approx 0.333" * 150,
    "tower": "x=" + "=".join(["9^{9^9}"] * 100),
    "matrices": r"\begin{pmatrix}9&8\\7&6\end{pmatrix}^{10}" * 40,
    "letters": r"\begin{pmatrix}a&b\\c&d\end{pmatrix}^{10}" * 40,
    "colons": ":".join([r"\sqrt{2}"] * 150),
    "cases": ";".join(f"p={place},q=2" for place in range(150)),
    "brackets": r"(\approx " * 60 + "1" + ")" * 60,
}


@pytest.mark.parametrize("answer", HOSTILE.values(), ids=HOSTILE)
def test_no_chain_or_product_costs_more_than_a_moment(answer: str) -> None:
    before = time.thread_time()
    assert not verify_answer("5", answer[:2000]).equal
    assert time.thread_time() - before < 0.5


@pytest.mark.parametrize(("gold", "candidate", "equal"), ROWS)
def test_a_kind_and_its_neighbours(gold: str, candidate: str, equal: bool) -> None:
    assert verify_answer(gold, candidate).equal is equal
    assert verify_answer(candidate, gold).equal is equal
